"""Plans dK and dV as fp32 partial sums, over query splits and over sequences that share keys.

Usually one CTA processes all queries of a key block, and rounds and writes its dK and dV. With few
keys that leaves the GPU idle, so the queries are split over CTAs, and a kernel adds up the parts in
fixed order. Very long sums drift as well, since tensor cores truncate: a CTA takes at most
`_MOST_ROWS` rows, and with many keys successive launches add to the same part. Keys in pages, or in
batch rows named by `batch_idx`, may belong to several sequences: each sequence has its own part,
and a kernel adds up those of each page, in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.kernels.kv_scatter import ScatterSpec
from jitattn.kernels.sum_parts import SumPartsSpec
from jitattn.plan import arguments
from jitattn.plan.step import Buffer, Place, Step
from jitattn.spec.enums import Dtype, SeqLayout

if TYPE_CHECKING:
    from jitattn.kernels.bwd import BwdSpec
    from jitattn.kernels.bwd_sm90 import BwdSm90Spec
    from jitattn.request.problem import Runtime
    from jitattn.spec.kernel_spec import KernelSpec, Problem

#: Most rows that a CTA accumulates. The relative drift is about 2^-25 for each MMA of 16 rows in 16
#: bits, which is a third of the rounding to that dtype then; fp32 sums are rounded to nearest.
_MOST_ROWS: Final = {Dtype.FP16: 1 << 17, Dtype.BF16: 1 << 18, Dtype.FP32: 1 << 16}
#: Least steps per CTA for which a split pays for the kernel that adds up the parts.
_LEAST_STEPS: Final = 8
ALL_TILES: Final = 2**31 - 1


class Split(NamedTuple):
    """The split of a key block's queries over CTAs and launches."""

    num_ctas: int = 1  #: that share the queries in a launch
    tiles_per_launch: int = ALL_TILES
    num_launches: int = 1


class KvStrides(NamedTuple):
    """Strides of dK or dV, or of their parts, in elements."""

    split: int
    batch: int
    row: int
    head: int


class KvGradient(NamedTuple):
    """dK or dV: a contiguous tensor like k or v."""

    name: str
    shape: tuple[int, ...]
    row: int  #: row dimension; the head dimension is next to it
    is_flat: bool

    @property
    def strides(self) -> tuple[int, int, int]:
        """Return the (batch or page, row, head) strides."""
        dim = self.shape[-1]
        if self.is_flat:
            return 0, self.shape[1] * dim, dim
        steps = (0, self.shape[2] * dim, dim)
        return self.shape[1] * steps[1], steps[self.row], steps[3 - self.row]

    @property
    def length(self) -> int:
        """Return the rows per sequence, per page, or in all if flat."""
        return self.shape[0] if self.is_flat else self.shape[self.row]


class KvTarget(NamedTuple):
    """The destination of dK or dV in a backward kernel."""

    place: Place
    strides: KvStrides
    parts: Buffer | None = None


def choose_split(
    spec: BwdSpec | BwdSm90Spec,
    num_slots: int,
    runtime: Runtime,
    tiles: tuple[int, int],
    *,
    is_fixed: bool,
) -> Split:
    """Choose the query split of a backward pass.

    Parameters
    ----------
    spec : BwdSpec or BwdSm90Spec
    num_slots : int
        CTAs that fit the GPU at once.
    runtime : Runtime
    tiles : (int, int)
        Query tiles and key blocks of the longest sequence.
    is_fixed : bool
        The result of a sequence must not depend on the rest of the batch.
    """
    num_q_tiles, num_kv_tiles = tiles
    group = runtime.heads_q // runtime.heads_kv
    num_ctas = num_kv_tiles * runtime.heads_kv * runtime.batch
    steps = num_q_tiles * group
    most_tiles = max(1, _MOST_ROWS[spec.problem.dtype] // (spec.tile.block_q * group))
    splits = 1
    if not is_fixed and 2 * num_ctas <= num_slots:
        splits = max(1, min(num_slots // num_ctas, num_q_tiles, steps // _LEAST_STEPS))
    launches = -(-num_q_tiles // (splits * most_tiles))
    return Split(splits, -(-num_q_tiles // launches), launches)


def plain_target(gradient: KvGradient) -> KvTarget:
    """Return dK or dV itself as the target: a single CTA writes rounded values."""
    return KvTarget(Place(gradient.name), KvStrides(0, *gradient.strides))


def parts_target(
    gradient: KvGradient, split: Split, problem: Problem, runtime: Runtime
) -> KvTarget:
    """Return an fp32 buffer for the parts of dK or dV as the target."""
    is_covered = split.num_launches == 1
    if runtime.shares_rows:
        dim = gradient.shape[-1]
        shape: tuple[int, ...] = (runtime.batch, runtime.len_kv, runtime.heads_kv, dim)
        row, head = runtime.heads_kv * dim, dim
        strides = (runtime.len_kv * row, row, head)
    else:
        shape, strides = gradient.shape, gradient.strides
        is_covered = is_covered and problem.kv_layout is SeqLayout.BATCHED
    size = 1
    for one in shape:
        size *= one
    parts = Buffer((split.num_ctas, *shape), "fp32", is_zeroed=not is_covered)
    return KvTarget(Place(f"{gradient.name}_parts"), KvStrides(size, *strides), parts)


def combine(
    target: KvTarget,
    gradient: KvGradient,
    scale: float,
    unscale: Place | None,
    runtime: Runtime,
    dtype: Dtype,
    arch: str,
) -> Step:
    """Plan the launch that adds up the parts of dK or dV in fixed order, and rounds.

    Parameters
    ----------
    target : KvTarget
        Of `parts_target`.
    gradient : KvGradient
    scale : float
    unscale : Place, optional
        Of another factor.
    """
    dim = gradient.shape[-1]
    num_rows = 1
    for size in gradient.shape[:-1]:
        num_rows *= size
    num_threads = num_rows * -(-dim // 4)
    numbers: dict[str, float] = {
        "num_rows": num_rows,
        "num_parts": 1 if target.parts is None else target.parts.shape[0],
        "scale": scale,
    }
    places = {"out": Place(gradient.name)}
    if unscale is None:
        numbers["unscale"] = 0
    else:
        places["unscale"] = unscale
    strides = target.strides
    if not runtime.shares_rows:
        spec: KernelSpec = SumPartsSpec(dtype=dtype, head_dim=dim, arch=arch)
        places["parts"] = target.place
        numbers |= {
            "part_stride_part": strides.split,
            "part_stride_batch": strides.batch,
            "part_stride_row": strides.row,
            "part_stride_head": strides.head,
            **arguments.strides("out", gradient.strides),
            "length": gradient.length,
            "heads": runtime.heads_kv,
        }
        return Step(spec, -(-num_threads // spec.num_threads), numbers, places)
    of_sequences, where = arguments.sequences(runtime)
    page, row, head = gradient.strides
    spec = ScatterSpec(dtype=dtype, head_dim=dim, arch=arch)
    places |= {"sum": target.place, "entries": Place("entries"), "bounds": Place("bounds")}
    for name in ("kv_start", "kv_stop"):
        if name in where:
            places[name] = where[name]
        else:
            numbers[name] = 0
    numbers |= {
        "sum_stride_part": strides.split,
        "sum_stride_batch": strides.batch,
        "sum_stride_row": strides.row,
        "sum_stride_head": strides.head,
        "out_stride_page": page,
        "out_stride_row": row,
        "out_stride_head": head,
        "heads": runtime.heads_kv,
        "page_size": gradient.length,
        "table_width": runtime.table_width,
        "longest": runtime.len_kv,
        "kv_rows": of_sequences["kv_rows"],
        "kv_word": of_sequences["kv_word"],
        "kv_span_kind": of_sequences["kv_span_kind"],
    }
    return Step(spec, -(-num_threads // spec.num_threads), numbers, places)

"""dK and dV as fp32 parts: of splits of the queries, and of sequences that share keys.

Usually one CTA has all queries of a key block, and rounds and writes its dK and dV. Where keys are
few, that leaves the chip empty: the queries are split over CTAs, and a kernel adds up their parts
in order. Sums of very many steps drift as well, since tensor cores truncate: a CTA takes no more
than `_MOST_ROWS` rows, and where keys are many, launches follow one another and add to the same
part. Keys in pages, or in rows of the batch that sequences name, may be of several sequences: each
has a part of its own, and a kernel goes through those of each page, in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import InternalError
from jitattn.jit import backend
from jitattn.jit.get_kernel import loaded_kernel
from jitattn.spec.enums import Dtype, SeqLayout
from jitattn.spec.kernel_spec import ScatterSpec, SumPartsSpec
from jitattn.values.sequences import Padded, Paged
from jitattn.values.tensors import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call, Runtime
    from jitattn.spec.kernel_spec import BwdSpec, KernelSpec, Problem

#: Rows that a CTA adds up. The relative drift is about 2^-25 for each MMA of 16 rows in 16 bits,
#: which is a third of the rounding to that dtype then; fp32 sums are rounded to nearest.
_MOST_ROWS: Final = {Dtype.FP16: 1 << 17, Dtype.BF16: 1 << 18, Dtype.FP32: 1 << 16}
#: Steps of a CTA below which a split does not pay for the kernels that add up.
_LEAST_STEPS: Final = 8
_ALL_TILES: Final = 2**31 - 1


class Split(NamedTuple):
    """How the queries of a key block are cut."""

    num_ctas: int = 1  #: that share them in a launch
    tiles_per_launch: int = _ALL_TILES
    num_launches: int = 1


class KvStrides(NamedTuple):
    """Strides in elements."""

    split: int
    batch: int
    row: int
    head: int


class KvTarget(NamedTuple):
    """Where a backward kernel writes dK or dV."""

    tensor: Tensor
    strides: KvStrides


def choose_split(
    spec: BwdSpec, num_slots: int, runtime: Runtime, tiles: tuple[int, int], *, is_fixed: bool
) -> Split:
    """Return the split of a pass.

    Parameters
    ----------
    spec : BwdSpec
    num_slots : int
        CTAs that the GPU holds at a time.
    runtime : Runtime
    tiles : (int, int)
        Query tiles and key blocks of the longest sequence.
    is_fixed : bool
        The result of a sequence may not depend on what is beside it in the batch.
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


def shares_rows(call: Call) -> bool:
    """Return whether sequences may share rows of k and v."""
    seqs = call.kv_seqs
    return isinstance(seqs, Paged) or (isinstance(seqs, Padded) and seqs.batch_idx is not None)


def plain_target(gradient: Tensor, call: Call) -> KvTarget:
    """Return dK or dV itself as the target: one writer, rounded."""
    return KvTarget(gradient, KvStrides(0, *_strides(gradient, call)))


def parts_target(
    gradient: Tensor, split: Split, problem: Problem, runtime: Runtime, call: Call
) -> KvTarget:
    """Return room for the parts of dK or dV."""
    dim = gradient.shape[-1]
    if shares_rows(call):
        shape: tuple[int, ...] = (runtime.batch, runtime.len_kv, runtime.heads_kv, dim)
        is_covered = split.num_launches == 1
    else:
        shape = tuple(gradient.shape)
        is_covered = split.num_launches == 1 and problem.kv_layout is SeqLayout.BATCHED
    make = torch.empty if is_covered else torch.zeros
    parts = make((split.num_ctas, *shape), dtype=torch.float32, device=gradient.device)
    inner = parts[0]
    strides = inner.stride()[:3] if shares_rows(call) else _strides(inner, call)
    return KvTarget(parts, KvStrides(parts.stride(0), *strides))


def combine(
    target: KvTarget,
    gradient: Tensor,
    scale: float,
    unscale: int,
    runtime: Runtime,
    call: Call,
    arch: str,
) -> None:
    """Add up the parts of dK or dV, in order, and round: one launch in the current stream.

    Parameters
    ----------
    target : KvTarget
        Of `parts_target`.
    gradient : Tensor
        The result, like k or v and contiguous.
    scale : float
    unscale : int
        Address of another factor, or 0.
    """
    index = gradient.get_device()
    stream = backend.active.stream(index)
    dim = gradient.shape[-1]
    num_rows = gradient.numel() // dim
    num_threads = num_rows * -(-dim // 4)
    num_parts = target.tensor.shape[0]
    out_strides = _strides(gradient, call)
    if not shares_rows(call):
        spec: KernelSpec = SumPartsSpec(dtype=DTYPES[gradient.dtype], head_dim=dim, arch=arch)
        loaded_kernel(spec, index).launch(
            -(-num_threads // spec.num_threads),
            stream,
            target.tensor.data_ptr(),
            gradient.data_ptr(),
            unscale,
            *target.strides,
            *out_strides,
            num_rows,
            _length(gradient, call),
            runtime.heads_kv,
            num_parts,
            scale,
        )
        return
    if runtime.indices is None:
        raise InternalError("sequences that share keys have no indices")
    entries, bounds, table_width, page_size = _entries(gradient, call)
    addresses, counts = runtime.indices.addresses, runtime.indices.counts
    spec = ScatterSpec(dtype=DTYPES[gradient.dtype], head_dim=dim, arch=arch)
    loaded_kernel(spec, index).launch(
        -(-num_threads // spec.num_threads),
        stream,
        target.tensor.data_ptr(),
        gradient.data_ptr(),
        unscale,
        entries.data_ptr(),
        bounds.data_ptr(),
        addresses[2],
        addresses[3],
        *target.strides,
        *out_strides,
        num_rows,
        runtime.heads_kv,
        page_size,
        table_width,
        runtime.len_kv,
        counts[6],
        counts[1],
        counts[4],
        num_parts,
        scale,
        0,
    )


def _strides(tensor: Tensor, call: Call) -> tuple[int, int, int]:
    """Strides of (batch or page, row, head)."""
    stride = tensor.stride()
    if tensor.dim() == 3:
        return 0, stride[0], stride[1]
    row = _row_axis(call)
    return stride[0], stride[row], stride[3 - row]


def _row_axis(call: Call) -> int:
    return 1 if call.layout == "bshd" or isinstance(call.kv_seqs, Paged) else 2


def _length(tensor: Tensor, call: Call) -> int:
    return tensor.shape[0] if tensor.dim() == 3 else tensor.shape[_row_axis(call)]


def _entries(tensor: Tensor, call: Call) -> tuple[Tensor, Tensor, int, int]:
    """Return the places of a block table in the order of their pages, and where each page begins.

    Places that no key of their sequence is in come last, behind all pages.
    """
    seqs, num_pages = call.kv_seqs, tensor.shape[0]
    page_size = _length(tensor, call)
    if isinstance(seqs, Paged):
        pages, width = seqs.block_table, seqs.block_table.shape[1]
        begin = torch.arange(width, device=tensor.device, dtype=torch.int64) * page_size
        start = 0 if seqs.start is None else seqs.start[:, None]
        stop = seqs.length[:, None] + start
        is_used = (begin < stop) & (begin + page_size > start)
    elif isinstance(seqs, Padded) and seqs.batch_idx is not None:
        pages, width = seqs.batch_idx[:, None], 1
        is_used = torch.ones_like(pages, dtype=torch.bool)
    else:
        raise InternalError("no sequences share keys")
    is_used = is_used & (pages >= 0) & (pages < num_pages)
    ordered, entries = pages.long().masked_fill(~is_used, num_pages).flatten().sort(stable=True)
    every = torch.arange(num_pages + 1, device=tensor.device, dtype=torch.int64)
    return entries, torch.searchsorted(ordered, every), width, page_size

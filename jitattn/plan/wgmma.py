"""Decides which calls take the wgmma kernels of sm_90, and describes their operands to TMA.

Every other call takes the mma.sync kernels, which serve all of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.jit.tensor_maps import MOST_EXTENT, MOST_STRIDE, BoxedTensor
from jitattn.kernels.fwd_sm90 import PAGE, fwd_sm90_specs, refusal_of_problem
from jitattn.spec.enums import MaskKind

if TYPE_CHECKING:
    from jitattn.kernels.fwd_sm90 import FwdSm90Spec, Sm90Tile
    from jitattn.plan.step import Device
    from jitattn.request.problem import Runtime, Strides
    from jitattn.spec.kernel_spec import Problem

#: Bytes of K and V that tiles of several heads share in L2, 50 MB on an H200, unless all keys are
#: seen. TFLOP/s at D=128, 16 heads of 4096 and of 16384 keys, causal: all heads 503 and 603, 24 MB
#: 570 and 625, 6 MB 547 and 611. Full, ragged, 4096: a head at a time 592, 24 MB 567, all 542.
_SECTION_BYTES: Final = 24 * 2**20
#: Rows and keys that a tile of 192 rows multiplies in the time in which one of 128 multiplies one.
#: D=64, H200, us: 16 x 1024 causal 256 and 234, full 320 and 340; 4096 causal 626 and 661.
_TALL_SPEED: Final = 1.15
#: Ratio of the times of tiles with packed heads and without.
_PACKED_COST: Final = 1.05
#: Ratio of the time of wgmma's tiles to that of full ones from which on mma.sync is faster.
_MOST_COST: Final = 1.4
_PLAIN_ROWS: Final = 128
_BYTES: Final = 2  # of an element; fp32 comes as fp16 parts
#: Rows of Q that one copy moves: those of a consumer.
_BOX_ROWS: Final = 64
#: Keys of a group of a block list.
_GROUP: Final = 16


class Choice(NamedTuple):
    """A wgmma kernel for a call, or why there is none."""

    spec: FwdSm90Spec | None
    heads_per_tile: int = 1
    refusal: str = ""


def choice(problem: Problem, runtime: Runtime, packed: int, device: Device) -> Choice:
    """Choose the wgmma kernel of a call with long queries, and how many heads a tile packs.

    Parameters
    ----------
    problem, runtime : Problem, Runtime
        Of the attention kernel, after operand preparation.
    packed : int
        Query heads packed into a tile of mma.sync.
    device : Device
    """
    reason = _refusal(problem, runtime, device)
    if reason is not None:
        return Choice(None, refusal=reason)
    options = {1, packed} if runtime.listed is not None else {1, packed, _group(runtime)}
    found = [
        (_cost(problem, runtime, spec.tile.block_q, heads), spec, heads)
        for spec in fwd_sm90_specs(problem)
        for heads in sorted(options)
        if _packs(runtime, heads)
    ]
    cost, spec, heads = min(found, key=lambda one: one[0])
    if cost > _MOST_COST * _cost(problem, runtime, _PLAIN_ROWS, packed):
        return Choice(None, refusal="tiles of mma.sync are filled better")
    return Choice(spec, heads)


def may_serve(problem: Problem, device: Device) -> bool:
    """Return whether calls of a problem take a wgmma kernel, at some sizes and strides."""
    return device.has_wgmma and refusal_of_problem(problem) is None


def _refusal(problem: Problem, runtime: Runtime, device: Device) -> str | None:
    if not device.has_wgmma:
        return "the device or its driver has no wgmma, or JITATTN_FAMILY is sm80"
    reason = refusal_of_problem(problem)
    if reason is not None:
        return reason
    if runtime.scale < 0:
        return "the scale is negative"
    boxed = [boxed(problem, runtime, 1) for boxed in (boxed_q, boxed_k, boxed_v)]
    if runtime.len_kv == 0 or not all(map(is_encodable, boxed)):
        return "q, k or v has no rows, or too distant ones"
    rows = (rows_of_q(runtime), *(2 * (sizes_of_keys(problem, runtime)[0],)))
    strides = (runtime.q_strides, runtime.k_strides, runtime.v_strides)
    dims = (_width(problem), _width(problem), _width_v(problem))
    for size, (_, step, _), dim in zip(rows, strides, dims, strict=True):
        if size > 1 and step < dim:
            return "rows of q, k or v overlap"
    if 0 < runtime.q_strides[2] < _width(problem):
        return "heads of q overlap"
    return None


def _width(problem: Problem) -> int:
    """Return the elements of a row of q and k: of both parts, if these are two."""
    return problem.head_dim * max(1, problem.numerics.num_parts)


def _width_v(problem: Problem) -> int:
    return problem.head_dim_v * max(1, problem.numerics.num_parts)


def _group(runtime: Runtime) -> int:
    return runtime.heads_q // runtime.heads_kv


def _packs(runtime: Runtime, packed: int) -> bool:
    """Return whether one copy can move positions of all packed heads, 64 rows together."""
    return packed == 1 or (_BOX_ROWS % packed == 0 and runtime.q_strides[2] != 0)


def _cost(problem: Problem, runtime: Runtime, block_q: int, packed: int) -> float:
    """Return the time of a head's tiles, in pairs of a row and a key of tiles of 128 rows."""
    num_tiles = -(-runtime.len_q * packed // block_q)
    positions = block_q // packed
    rows = num_tiles * block_q / packed
    speed = _TALL_SPEED if block_q > _PLAIN_ROWS else 1.0
    if packed > 1:
        speed /= _PACKED_COST
    return rows * _seen(problem, runtime, num_tiles * positions, positions) / speed


def _seen(problem: Problem, runtime: Runtime, end: int, positions: int) -> float:
    """Return the keys that tiles of so many positions see on average, up to position `end`."""
    len_kv, indices = runtime.len_kv, runtime.indices
    diagonal = runtime.diagonal
    if indices is not None and indices.arguments.bottom_right:
        diagonal += len_kv - runtime.len_q
    if problem.mask is MaskKind.FULL or runtime.listed is not None:
        return len_kv
    first, last = (min(max(diagonal + position, 1), len_kv) for position in (positions, end))
    return (first + last) / 2


def maps_of(
    problem: Problem, runtime: Runtime, tile: Sm90Tile, packed: int
) -> tuple[tuple[str, BoxedTensor], ...]:
    """Return the tensors that TMA copies, with their boxes, by argument."""
    return (
        ("q", boxed_q(problem, runtime, packed)),
        ("k", boxed_k(problem, runtime, piece_rows(problem, runtime, tile))),
        ("v", boxed_v(problem, runtime, piece_rows(problem, runtime, tile))),
    )


def piece_rows(problem: Problem, runtime: Runtime, tile: Sm90Tile) -> int:
    """Return the rows of a key block that one copy moves."""
    if problem.mask is MaskKind.BLOCK_LISTS:
        return _GROUP
    if problem.kv_layout.page_group and runtime.indices is not None:
        return math.gcd(runtime.indices.arguments.page_size, tile.block_kv)
    return tile.block_kv


def section_heads(problem: Problem, runtime: Runtime, packed: int) -> int:
    """Return the number of head tiles that are visited together."""
    group = _group(runtime) // packed
    if problem.mask is MaskKind.FULL:
        return group  # all tiles of a head share its keys
    of_head = runtime.len_kv * (_width(problem) + _width_v(problem)) * _BYTES
    fitting = max(1, _SECTION_BYTES // max(1, of_head)) * group
    # Sequences of different lengths are counted for each head alike.
    batch = runtime.batch if problem.is_uniform else 1
    return min(fitting, batch * runtime.heads_q // packed)


def boxed_q(problem: Problem, runtime: Runtime, packed: int) -> BoxedTensor:
    """Return q as [B, Hkv, Lq, Hq / Hkv, D], in boxes of the rows of a consumer."""
    by_batch, by_row, by_head = runtime.q_strides
    group = _group(runtime)
    sizes = (group, rows_of_q(runtime), runtime.heads_kv, runtime.batch)
    steps = (by_head, by_row, by_head * group, by_batch)
    return make_box(problem, _width(problem), sizes, steps, (packed, _BOX_ROWS // packed))


def boxed_k(problem: Problem, runtime: Runtime, block_kv: int) -> BoxedTensor:
    """Return k, in boxes of a key block."""
    return _boxed_keys(problem, runtime, _width(problem), runtime.k_strides, block_kv)


def boxed_v(problem: Problem, runtime: Runtime, block_kv: int) -> BoxedTensor:
    """Return v, in boxes of a key block."""
    return _boxed_keys(problem, runtime, _width_v(problem), runtime.v_strides, block_kv)


def _boxed_keys(
    problem: Problem, runtime: Runtime, dim: int, strides: Strides, box_rows: int
) -> BoxedTensor:
    by_batch, by_row, by_head = strides
    steps = (by_row, by_head, by_batch)
    return make_box(problem, dim, sizes_of_keys(problem, runtime), steps, (box_rows,))


def rows_of_q(runtime: Runtime) -> int:
    """Return the rows of q, of a sequence or of all in one tensor."""
    return runtime.len_q if runtime.indices is None else runtime.indices.arguments.q_rows


def sizes_of_keys(problem: Problem, runtime: Runtime) -> tuple[int, int, int]:
    """Return the rows, heads and batch of k and v; in pages, those of a page and their number."""
    if runtime.indices is None:
        return runtime.len_kv, runtime.heads_kv, runtime.batch
    found = runtime.indices.arguments
    if problem.kv_layout.page_group:
        return found.page_size, runtime.heads_kv, found.num_pages
    # With rows by index, the batch of k and v is another.
    return found.kv_rows, runtime.heads_kv, found.num_pages or runtime.batch


def make_box(
    problem: Problem,
    dim: int,
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    box: tuple[int, ...],
) -> BoxedTensor:
    """Return a tensor, its innermost dimension first; one with stride 0 has no extent.

    `box`: the extents of a box after the innermost one; 1 where there are no more.
    """
    extents = (size if step else 1 for size, step in zip(sizes, steps, strict=True))
    least = -(-dim * _BYTES // 16) * 16
    return BoxedTensor(
        "fp16" if problem.numerics.num_parts else problem.dtype.value,
        (dim, *extents),
        tuple(step * _BYTES if step else least for step in steps),
        (PAGE, *box, *([1] * (len(sizes) - len(box)))),
    )


def is_encodable(boxed: BoxedTensor) -> bool:
    """Return whether a tensor map can describe a tensor."""
    extents = all(0 < size <= MOST_EXTENT for size in boxed.shape)
    return extents and all(0 < step <= MOST_STRIDE and step % 16 == 0 for step in boxed.strides)

"""Decides which calls take the wgmma kernels of sm_90, and describes their operands to TMA.

Every other call takes the mma.sync kernels, which serve all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jitattn.jit.tensor_maps import MOST_EXTENT, MOST_STRIDE, BoxedTensor
from jitattn.kernels.fwd_sm90 import PAGE, fwd_sm90_spec, refusal_of_problem

if TYPE_CHECKING:
    from jitattn.kernels.fwd_sm90 import Sm90Tile
    from jitattn.plan.step import Device
    from jitattn.request.problem import Runtime, Strides
    from jitattn.spec.kernel_spec import Problem

#: Bytes of K and V that causal tiles of several heads share in L2, 50 MB on an H200. TFLOP/s at
#: D=128, 16 heads of 4096 and of 16384 keys: all heads 503 and 603, 24 MB 570 and 625, 6 MB 547 and
#: 611.
_SECTION_BYTES: Final = 24 * 2**20
#: Least ratio of the filled share of tiles to that of mma.sync's, whose kernels are slower.
#: us, D=64, 32 heads of 256 queries, H200: wgmma 13.2, mma.sync 11.9; of 1024, 35.2 and 33.8, in a
#: batch of 16 319 and 425. D=128, 16 heads of 256: 13.0 and 13.4.
_LEAST_FILLED: Final = 0.7
_MMA_BLOCK_Q: Final = 128
_BYTES: Final = 2  # of an element


def refusal(problem: Problem, runtime: Runtime, packed: int, device: Device) -> str | None:
    """Return why a call with long queries does not take a wgmma kernel; None if it does.

    Parameters
    ----------
    problem, runtime : Problem, Runtime
        Of the attention kernel, after operand preparation.
    packed : int
        Query heads packed into a tile of mma.sync; wgmma packs none.
    device : Device
    """
    if not device.has_wgmma:
        return "the device or its driver has no wgmma, or JITATTN_FAMILY is not sm90"
    reason = refusal_of_problem(problem)
    if reason is not None:
        return reason
    block_q = fwd_sm90_spec(problem).tile.block_q
    filled = _filled(runtime.len_q, block_q)
    if filled < _LEAST_FILLED * _filled(runtime.len_q * packed, _MMA_BLOCK_Q):
        return "tiles of mma.sync, with the query heads packed into them, are filled better"
    if runtime.scale < 0:
        return "the scale is negative"
    boxed = (boxed_q(problem, runtime), boxed_k(problem, runtime, 1), boxed_v(problem, runtime, 1))
    if runtime.len_kv == 0 or not all(map(_is_encodable, boxed)):
        return "q, k or v has no rows, or too distant ones"
    rows = (_rows_of_q(runtime), *(2 * (_sizes_of_keys(runtime)[0],)))
    strides = (runtime.q_strides, runtime.k_strides, runtime.v_strides)
    dims = (problem.head_dim, problem.head_dim, problem.head_dim_v)
    for size, (_, step, _), dim in zip(rows, strides, dims, strict=True):
        if size > 1 and step < dim:
            return "rows of q, k or v overlap"
    return None


def _filled(num_rows: int, block_q: int) -> float:
    return num_rows / (-(-num_rows // block_q) * block_q)


def maps_of(
    problem: Problem, runtime: Runtime, tile: Sm90Tile
) -> tuple[tuple[str, BoxedTensor], ...]:
    """Return the tensors that TMA copies, with their boxes, by argument."""
    return (
        ("q", boxed_q(problem, runtime)),
        ("k", boxed_k(problem, runtime, tile.block_kv)),
        ("v", boxed_v(problem, runtime, tile.block_kv)),
    )


def section_heads(problem: Problem, runtime: Runtime) -> int:
    """Return the number of query heads whose causal tiles are visited together."""
    group = runtime.heads_q // runtime.heads_kv
    of_head = runtime.len_kv * (problem.head_dim + problem.head_dim_v) * _BYTES
    fitting = max(1, _SECTION_BYTES // max(1, of_head)) * group
    return min(runtime.batch * runtime.heads_q, fitting)


def boxed_q(problem: Problem, runtime: Runtime) -> BoxedTensor:
    """Return q, in boxes of a consumer's rows."""
    sizes = (_rows_of_q(runtime), runtime.heads_q, runtime.batch)
    return _boxed(problem, problem.head_dim, sizes, runtime.q_strides, 64)


def boxed_k(problem: Problem, runtime: Runtime, block_kv: int) -> BoxedTensor:
    """Return k, in boxes of a key block."""
    sizes = _sizes_of_keys(runtime)
    return _boxed(problem, problem.head_dim, sizes, runtime.k_strides, block_kv)


def boxed_v(problem: Problem, runtime: Runtime, block_kv: int) -> BoxedTensor:
    """Return v, in boxes of a key block."""
    sizes = _sizes_of_keys(runtime)
    return _boxed(problem, problem.head_dim_v, sizes, runtime.v_strides, block_kv)


def _rows_of_q(runtime: Runtime) -> int:
    return runtime.len_q if runtime.indices is None else runtime.indices.arguments.q_rows


def _sizes_of_keys(runtime: Runtime) -> tuple[int, int, int]:
    if runtime.indices is None:
        return runtime.len_kv, runtime.heads_kv, runtime.batch
    found = runtime.indices.arguments
    # With rows by index, the batch of k and v is another.
    return found.kv_rows, runtime.heads_kv, found.num_pages or runtime.batch


def _boxed(
    problem: Problem, dim: int, sizes: tuple[int, int, int], strides: Strides, box_rows: int
) -> BoxedTensor:
    """Return a tensor of (row, head, batch) sizes; a dimension with stride 0 has no extent."""
    by_batch, by_row, by_head = strides
    steps = (by_row, by_head, by_batch)
    extents = (size if step else 1 for size, step in zip(sizes, steps, strict=True))
    least = -(-dim * _BYTES // 16) * 16
    return BoxedTensor(
        problem.dtype.value,
        (dim, *extents),
        tuple(step * _BYTES if step else least for step in steps),
        (PAGE, box_rows, 1, 1),
    )


def _is_encodable(boxed: BoxedTensor) -> bool:
    extents = all(0 < size <= MOST_EXTENT for size in boxed.shape)
    return extents and all(0 < step <= MOST_STRIDE and step % 16 == 0 for step in boxed.strides)

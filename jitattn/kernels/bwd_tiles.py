"""Tile tables of the backward kernels: pure functions of problem and architecture.

Tuning knowledge is data with a comment. Figures: cuda_src/notes/0006.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from jitattn.errors import InternalError
from jitattn.kernels.operands import split_fp32_backward
from jitattn.kernels.tiles import half_of, max_smem_bytes
from jitattn.spec.enums import (
    Access,
    BiasKind,
    Dtype,
    MaskKind,
    Numerics,
    SeqLayout,
    Staging,
    Switch,
)
from jitattn.spec.kernel_spec import SWITCHES, Problem, padded_head_dim
from jitattn.spec.program import parse
from jitattn.values.gears import resolve_numerics

#: block_q, block_kv, num_warps, warps_q, warps_keys, warps_dq, stages: the first that fits is
#: taken, of the row for the largest padded head dim that it serves.
_Row = tuple[int, int, int, int, int, int, int]
_Table = dict[int, tuple[_Row, ...]]
#: Tiles of four warps are for two CTAs per multiprocessor, and skipped where only one fits.
#: TFLOP/s of an H200, bf16, 16k keys, full / causal.
_TILES: Final[_Table] = {
    # 287 / 281; 64x128 262 causal, 64x64 with 4 warps 274
    64: ((128, 128, 8, 4, 4, 4, 2), (64, 128, 8, 2, 4, 2, 2), (64, 64, 8, 4, 2, 2, 2)),
    # 325 / 313; 64x64 with 4 warps 310 causal, with 8 245, 128x64 262
    128: ((64, 128, 8, 2, 4, 2, 2), (64, 64, 8, 4, 2, 2, 1)),
    192: ((64, 64, 8, 4, 2, 2, 2), (64, 64, 8, 4, 2, 2, 1), (32, 64, 8, 2, 2, 2, 1)),
    256: ((64, 64, 8, 4, 2, 2, 1), (32, 32, 8, 2, 2, 2, 1)),
}
#: Patterns with blocks of 64 keys or fewer: wider tiles visit hidden keys. Local 16 of
#: stride 8, us: D=64 1463 (128x128 2007), D=128 2611 (2 stages 2690, 128x64 3151, 64x128 3617).
_SPARSE: Final[_Table] = {
    **_TILES,
    64: ((64, 64, 4, 2, 2, 2, 2), (64, 64, 4, 2, 2, 2, 1), (64, 64, 8, 4, 2, 2, 2)),
    128: ((64, 64, 4, 2, 2, 2, 1), (64, 64, 8, 4, 2, 2, 2), (64, 64, 8, 4, 2, 2, 1)),
}
#: Patterns with gathered blocks of 16 and 32. Local 32 of stride 8 in blocks of 32, us: D=64 1381
#: (64x128 1465, 128x128 1389), D=128 2512 (64x64 with 4 warps 2899).
_FINE: Final[_Table] = {**_SPARSE, 128: ((64, 128, 8, 2, 4, 2, 2), *_SPARSE[128])}
#: Windows, us at D=128: 1024 keys 1330 (1 stage 1424, 64x128 1446), 4096 4024 (4344, 4161).
_WINDOW: Final[_Table] = {**_SPARSE, 128: ((64, 64, 4, 2, 2, 2, 2), *_SPARSE[128])}
#: Score modifications and sequence layouts need registers. D=64, softcap, us: 5591
#: (128x128 6039).
_CHANGED: Final[_Table] = {
    **_TILES,
    64: _SPARSE[64],
    192: ((64, 64, 8, 4, 2, 2, 1), (32, 64, 8, 2, 2, 2, 1)),
}
_FP32: Final[_Table] = {
    64: ((64, 64, 8, 4, 2, 2, 1), (32, 64, 8, 2, 2, 2, 1)),
    128: ((32, 64, 8, 2, 2, 2, 1), (32, 32, 8, 2, 2, 2, 1)),
    256: ((32, 32, 8, 2, 2, 2, 1), (16, 16, 8, 1, 1, 1, 1)),
}
#: fp32 as fp16 parts, which take the same shared memory. us, full: D=64, 4 x 4k, 8 heads, 3343
#: (TF32 9837, 8 warps 3612 to 4371, two stages 4009, 32x64 3721 and more), D=128, 8k, 16 heads,
#: 14834 (TF32 39451, 32x64 15185 and more, 32x32 16655 and more). Four warps of D=48 would spill.
_SPLIT_FP32: Final[_Table] = {
    32: ((64, 64, 4, 2, 2, 2, 1), (64, 64, 8, 2, 2, 2, 1)),
    48: ((64, 64, 8, 2, 2, 2, 1),),
    64: ((64, 64, 4, 2, 2, 2, 1), (64, 64, 8, 2, 2, 2, 1)),
    112: ((32, 64, 8, 2, 2, 2, 1), (32, 32, 8, 2, 2, 2, 1)),
    128: ((64, 64, 8, 2, 2, 2, 1), (32, 32, 8, 2, 2, 2, 1)),
}
#: fp16 parts with score modifications other than positional masks and key padding, which take
#: further registers.
_SPLIT_FP32_CHANGED: Final[_Table] = {
    64: ((64, 64, 8, 2, 2, 2, 1),),
    128: ((32, 32, 8, 2, 2, 2, 1),),
}
#: Score-gradient kernels: square, one stage.
_SQUARES: Final[tuple[_Row, ...]] = (
    (64, 64, 8, 4, 4, 4, 1),
    (32, 32, 8, 2, 2, 2, 1),
    (16, 16, 8, 1, 1, 1, 1),
)
#: Optional inputs that cost registers.
_NEED_REGISTERS: Final = tuple(
    name for name in SWITCHES if name not in ("sinks", "key_padding", "fixed_shift")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BwdTile:
    """The tile of a backward kernel. Each product has its own warp grid."""

    block_q: int  #: rows of a step
    block_kv: int  #: keys of a CTA
    num_warps: int
    warps_scores: int  #: warps that compute scores
    warps_q: int  #: of them side by side along the rows
    warps_keys: int  #: warps side by side along the rows of dK and dV
    warps_dq: int  #: along the rows of dQ
    stages: int  #: Q and dO buffers; 1 takes four barriers a step, 2 two
    min_blocks_per_sm: int  #: of __launch_bounds__

    @property
    def num_threads(self) -> int:
        """Return the threads per CTA."""
        return 32 * self.num_warps


def smem_bytes(problem: Problem, tile: BwdTile) -> int:
    """Return the dynamic shared memory per CTA; `bwd/sm80/traits.cuh` asserts the same."""
    dims = padded_head_dim(problem.head_dim) + padded_head_dim(problem.head_dim_v)
    rows = tile.block_kv + tile.stages * tile.block_q
    size = (rows * dims + 2 * tile.block_q * tile.block_kv) * problem.dtype.bytes
    stats = 3 if problem.sinks is Switch.ON else 2
    size += 2 * 4 * stats * tile.block_q
    if problem.numerics.num_parts:  # scales of Q, dO and dS
        size += 2 * 16 + 4 * tile.warps_scores
    if problem.mask is MaskKind.BLOCK_LISTS:
        groups = tile.block_kv // 16
        has_mask = bool(problem.function) and parse(problem.function).mask is not None
        tile_bits = 3 if has_mask else 2
        size += 2 * 8 * groups + tile_bits * (tile.num_threads // 8)
        size += tile.num_threads * groups * 4
    return size


def backward_problem(problem: Problem) -> Problem:
    """Map a forward problem to the problem of its backward kernel.

    A fixed shift cancels, matrices are not staged, and all page sizes share a kernel. In every
    gear, gradients have the numerics of gear 2; fp16 parts are kept where a kernel supports them.
    """
    split_fp32 = problem.numerics is Numerics.F16X3 and split_fp32_backward(problem) is not None
    return replace(
        problem,
        out_dtype=problem.dtype,
        numerics=problem.numerics if split_fp32 else resolve_numerics(2, problem.dtype),
        kv_layout=SeqLayout.PAGED if problem.kv_layout.page_group else problem.kv_layout,
        fixed_shift=Switch.OFF,
        bias_staged=Staging.OFF,
        dense_staged=Staging.OFF,
    )


def choose_tile(problem: Problem, arch: str) -> BwdTile:
    """Choose the tile of the backward kernel of a backward problem.

    Raises
    ------
    UnsupportedError
        `arch` is older than sm_80.
    """
    limit = max_smem_bytes(arch)
    dim = max(padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v))
    table = _TILES
    if problem.numerics is Numerics.F16X3:
        table = _SPLIT_FP32_CHANGED if _changes_scores(problem) else _SPLIT_FP32
    elif problem.dtype is Dtype.FP32:
        table = _FP32
    elif problem.mask is MaskKind.WINDOW:
        table = _WINDOW
    elif problem.mask is MaskKind.FINE_STRIDE:
        table = _FINE
    elif problem.mask not in (MaskKind.FULL, MaskKind.CAUSAL):
        table = _SPARSE
    elif problem.access is Access.ELEMENT or _has_changes(problem) or not problem.is_uniform:
        table = _CHANGED
    for row in next(rows for top, rows in table.items() if dim <= top):
        tile = _tile(row)
        budget = half_of(limit) if tile.num_warps == 4 else limit
        if smem_bytes(problem, tile) <= budget:
            return tile
    raise InternalError(f"no backward tile fits {arch} for {problem}")


def choose_square(problem: Problem, arch: str, bytes_a_pair: int = 0) -> BwdTile:
    """Choose the square tile of a score-gradient kernel, with further room for each pair of it."""
    for row in _SQUARES:
        tile = _tile(row)
        room = bytes_a_pair * tile.block_q * tile.block_kv
        if smem_bytes(problem, tile) + room <= max_smem_bytes(arch):
            return tile
    raise InternalError(f"no tile of score gradients fits {arch} for {problem}")


def _has_changes(problem: Problem) -> bool:
    """Return whether scores are modified beyond a sink, which costs one product per weight."""
    return replace(problem, sinks=Switch.OFF).has_scores


def _changes_scores(problem: Problem) -> bool:
    changes = any(getattr(problem, name) is Switch.ON for name in _NEED_REGISTERS)
    return changes or problem.bias is not BiasKind.NONE


def _tile(row: _Row) -> BwdTile:
    block_q, block_kv, num_warps, warps_q, warps_keys, warps_dq, stages = row
    return BwdTile(
        block_q=block_q,
        block_kv=block_kv,
        num_warps=num_warps,
        warps_scores=min(num_warps, warps_q * (block_kv // 16)),
        warps_q=warps_q,
        warps_keys=warps_keys,
        warps_dq=warps_dq,
        stages=stages,
        min_blocks_per_sm=1,
    )

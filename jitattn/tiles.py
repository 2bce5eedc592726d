"""Tile tables and split counts: pure functions of problem, architecture, row class and counts.

Tuning knowledge is data with a comment. Nothing here reads a tensor. Figures: cuda_src/notes/0001.
"""

from __future__ import annotations

import functools
from typing import Final

from jitattn.errors import UnsupportedError
from jitattn.jit.spec import (
    Dtype,
    FwdSpec,
    Problem,
    RowClass,
    Tile,
    arch_number,
    padded_head_dim,
)

#: Largest shared memory of a block in bytes, by architecture; others get the smallest of these.
MAX_SMEM_BYTES: Final = {
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
#: What the runtime keeps for itself in every resident block.
_RESERVED_SMEM_BYTES: Final = 1024

#: (block_q, block_kv, warps_q, stages) by the largest padded head dim that the row serves, for
#: RowClass.MANY and 16-bit inputs. A row is skipped where it does not fit.
_Row = tuple[int, int, int, int]
_LARGE_SMEM: Final[dict[int, _Row]] = {
    64: (128, 128, 4, 1),  # 377 TFLOP/s at 4k where 128x64 with 2 stages gave 351 (H200, full)
    80: (128, 64, 4, 2),
    96: (128, 64, 4, 1),  # 387 against 379 with 2 stages
    128: (128, 64, 4, 2),  # 1 stage is as fast and spills 16 bytes; 3 stages do not fit twice
    160: (128, 32, 4, 2),  # 413 against 314 for 64x64: 32 rows a warp halve the K and V reads
    256: (128, 64, 8, 1),  # 32 rows a warp would spill 150 bytes from D=176 on
}
#: 163 KB on sm_80: one stage keeps two blocks on a multiprocessor.
_MEDIUM_SMEM: Final[dict[int, _Row]] = {**_LARGE_SMEM, 128: (128, 64, 4, 1)}
#: 99 KB on sm_86 and sm_89. The MMA rate, not shared memory, is the limit there: 16 rows a warp do.
_SMALL_SMEM: Final[dict[int, _Row]] = {
    64: (128, 64, 4, 2),
    96: (128, 64, 4, 1),
    128: (128, 32, 4, 1),
    192: (128, 64, 8, 1),
    256: (64, 64, 4, 1),
}
_TABLES: Final = {80: _MEDIUM_SMEM, 87: _MEDIUM_SMEM, 90: _LARGE_SMEM, 100: _LARGE_SMEM}

#: The same for fp32 inputs, on every architecture.
_FP32: Final[dict[int, _Row]] = {
    64: (64, 32, 4, 2),
    128: (64, 32, 4, 1),
    256: (64, 16, 4, 1),
}

#: Rows of a tile from which a query tile is worth filling with one position's heads only.
_LARGEST_BLOCK_Q: Final = 128


def max_smem_bytes(arch: str) -> int:
    """Return the largest shared memory of a block on `arch`, in bytes.

    Raises
    ------
    UnsupportedError
        `arch` is older than sm_80.
    """
    number = arch_number(arch)
    if number < 80:
        raise UnsupportedError(
            f"architecture {arch}: jitattn needs sm_80 or newer (cp.async and bf16 MMA); "
            "move the tensors to the CPU to use the CPU path"
        )
    return MAX_SMEM_BYTES.get(number, min(MAX_SMEM_BYTES.values()))


def choose_tile(problem: Problem, arch: str, rows: RowClass) -> Tile:
    """Return the tile of `problem` on `arch` for a row class.

    Raises
    ------
    UnsupportedError
        `arch` is older than sm_80.
    """
    limit = max_smem_bytes(arch)
    if rows is RowClass.ROWS16:
        return _short_query_tile(problem, arch, limit, block_q=16, warps_q=1, warps_kv=4)
    if rows is RowClass.ROWS64:
        return _short_query_tile(problem, arch, limit, block_q=64, warps_q=4, warps_kv=1)
    dim = max(padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v))
    table = _TABLES.get(arch_number(arch), _SMALL_SMEM)
    if problem.dtype is Dtype.FP32:
        table = _FP32
    block_q, block_kv, warps_q, stages = next(row for top, row in table.items() if dim <= top)
    return Tile(
        block_q=block_q,
        block_kv=block_kv,
        warps_q=warps_q,
        warps_kv=1,
        stages=stages,
        min_blocks_per_sm=1,
    )


def _short_query_tile(
    problem: Problem, arch: str, limit: int, *, block_q: int, warps_q: int, warps_kv: int
) -> Tile:
    """Choose the tile of a few rows on many keys: bytes in flight decide, so stages come first.

    Three stages in half of the shared memory, so that two blocks fit on a multiprocessor; then two;
    then whatever fits at all.
    """
    is_fp32 = problem.dtype is Dtype.FP32
    half = (limit + _RESERVED_SMEM_BYTES) // 2 - _RESERVED_SMEM_BYTES
    wide, narrow = 16 * warps_kv if is_fp32 else 64, 16 * warps_kv
    shapes = ((half, 3), (half, 2), (limit, 3), (limit, 2), (limit, 1))
    for block_kv in dict.fromkeys((wide, narrow)):
        for budget, stages in shapes:
            tile = Tile(
                block_q=block_q,
                block_kv=block_kv,
                warps_q=warps_q,
                warps_kv=warps_kv,
                stages=stages,
                min_blocks_per_sm=1,
            )
            if FwdSpec(problem=problem, tile=tile, arch=arch).smem_bytes <= budget:
                return tile
    raise UnsupportedError(
        f"head_dim {problem.head_dim} and {problem.head_dim_v} in {problem.dtype} on {arch}: "
        "no tile fits its shared memory; use a 16-bit dtype"
    )


def fwd_spec(problem: Problem, arch: str, rows: RowClass) -> FwdSpec:
    """Return the whole spec of the forward kernel of `problem` on `arch`."""
    return FwdSpec(problem=problem, tile=choose_tile(problem, arch, rows), arch=arch)


def heads_per_tile(len_q: int, group: int) -> int:
    """Return how many query heads of a kv head share a tile: all of them (`group`) or 1.

    Packing pays where one head's rows leave a good part of their last tile empty.
    """
    if group == 1:
        return 1
    alone = len_q / (-(-len_q // _LARGEST_BLOCK_Q) * _LARGEST_BLOCK_Q)
    rows = len_q * group
    packed = rows / (-(-rows // _LARGEST_BLOCK_Q) * _LARGEST_BLOCK_Q)
    return group if alone < 0.9 * packed or rows <= RowClass.ROWS64 else 1


@functools.lru_cache(maxsize=4096)
def choose_splits(num_tiles: int, num_kv_blocks: int, num_slots: int) -> int:
    """Return how many CTAs should share the keys of one query tile.

    Parameters
    ----------
    num_tiles : int
        Query tiles of all heads and batches.
    num_kv_blocks : int
        Key blocks of the longest tile.
    num_slots : int
        CTAs that the GPU holds at a time.
    """
    if num_kv_blocks <= 4 or num_tiles >= 0.8 * num_slots:
        return 1
    best, best_cost = 1, float(num_kv_blocks + _SPLIT_PROLOGUE)
    for waves in (1, 2, 3):
        splits = min(waves * num_slots // num_tiles, num_kv_blocks // 2, 128)
        if splits < 2:
            continue
        used = -(-num_kv_blocks // -(-num_kv_blocks // splits))  # without the empty ones
        cost = -(-num_tiles * used // num_slots) * (-(-num_kv_blocks // used) + _SPLIT_PROLOGUE)
        cost += _MERGE_COST + 0.1 * used
        if cost < best_cost:
            best, best_cost = used, cost
    return best


#: Costs in key blocks: starting a CTA, and the merge.
_SPLIT_PROLOGUE: Final = 3.0
_MERGE_COST: Final = 4.0

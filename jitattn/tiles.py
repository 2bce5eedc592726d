"""Tile tables: a pure function from problem, architecture and row class to `Tile`.

Tuning knowledge is data with a comment. Heuristics may read the problem and the architecture,
never tensors.
"""

from __future__ import annotations

from typing import Final

from jitattn.errors import UnsupportedError
from jitattn.jit.spec import Dtype, FwdSpec, Problem, RowClass, Tile, arch_number, padded_head_dim

#: Largest shared memory of a block in bytes, by architecture.
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


def max_smem_bytes(arch: str) -> int:
    """Largest shared memory of a block on `arch`, in bytes."""
    number = arch_number(arch)
    if number < 80:
        raise UnsupportedError(
            f"architecture {arch}: jitattn needs sm_80 or newer (cp.async and bf16 MMA); "
            "move the tensors to the CPU to use the CPU path"
        )
    return MAX_SMEM_BYTES.get(number, 99 * 1024)


def choose_tile(problem: Problem, arch: str, rows: RowClass) -> Tile:
    """Return the tile of `problem` on `arch` for a row class. Pure."""
    dim = max(padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v))
    size = problem.dtype.bytes
    limit = max_smem_bytes(arch)
    if rows is RowClass.ROWS16:
        tile = Tile(block_q=16, block_kv=64, warps_q=1, warps_kv=4, stages=3, min_blocks_per_sm=1)
    elif rows is RowClass.ROWS64 or problem.dtype is Dtype.FP32 or dim > 128:
        tile = Tile(block_q=64, block_kv=64, warps_q=4, warps_kv=1, stages=2, min_blocks_per_sm=1)
    else:
        tile = Tile(block_q=128, block_kv=64, warps_q=4, warps_kv=1, stages=2, min_blocks_per_sm=1)
    del size, limit
    return tile


def fwd_spec(problem: Problem, arch: str, rows: RowClass) -> FwdSpec:
    """Return the whole spec of the forward kernel of `problem` on `arch`."""
    return FwdSpec(problem=problem, tile=choose_tile(problem, arch, rows), arch=arch)

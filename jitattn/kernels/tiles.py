"""Chooses forward tiles and split counts: pure functions of problem, architecture and sizes.

Tuning knowledge is data with a comment. Nothing here reads a tensor. Figures: cuda_src/notes/0001.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Final

from jitattn.errors import InternalError, UnsupportedError
from jitattn.spec.enums import (
    Access,
    BiasKind,
    Dtype,
    MaskKind,
    Numerics,
    RowClass,
    Staging,
    Switch,
)
from jitattn.spec.kernel_spec import Problem, arch_number, padded_head_dim

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
#: Shared memory that the CUDA runtime reserves per resident CTA.
_RESERVED_SMEM_BYTES: Final = 1024
#: Shared memory of sm_80.
_MEDIUM_SMEM_BYTES: Final = 163 * 1024
#: Above this, a short query's tile may use a whole multiprocessor's shared memory.
_SMALLEST_LARGE_SMEM: Final = 200 * 1024

#: (block_q, block_kv, warps_q, stages) by the largest padded head dim that the row serves, for long
#: queries. TFLOP/s are of an H200, bf16, at 16k keys, full / causal, beside the next best tile.
_Table = dict[int, tuple[int, int, int, int]]
_LARGE_SMEM: Final[_Table] = {
    64: (128, 128, 4, 1),  # 382 / 379; 128x64 with 2 stages 358 / 340
    80: (128, 64, 4, 2),  # 341 / 352; 1 stage 338 / 339
    96: (128, 64, 4, 1),  # 397 / 399; 2 stages 365 / 395
    128: (128, 64, 4, 2),  # 416 / 418; 1 stage is as fast and spills 16 bytes
    160: (128, 32, 4, 2),  # 421 / 404; 64x64 318 / 324: 32 rows a warp halve the K and V reads
    192: (64, 64, 4, 1),  # 341 / 350; 128x32 358 / 347, but spills 150 to 200 bytes
    256: (128, 64, 8, 1),  # 351 / 358; 64x64 333 / 334
}
#: 163 KB on sm_80: one stage keeps two blocks on a multiprocessor at D=128.
_MEDIUM_SMEM: Final[_Table] = {**_LARGE_SMEM, 64: (128, 96, 4, 2), 128: (128, 64, 4, 1)}
#: 99 KB on sm_86 and sm_89. The MMA rate, not shared memory, is the limit there. Not measured.
_SMALL_SMEM: Final[_Table] = {
    64: (128, 64, 4, 2),
    96: (128, 64, 4, 1),
    128: (128, 32, 4, 1),
    192: (128, 64, 8, 1),
    256: (64, 64, 4, 1),
}
#: Sequence layouts: 128x128 would spill 88 bytes (753 us against 811 at 8k causal).
_LARGE_SMEM_SEQ: Final[_Table] = {**_LARGE_SMEM, 64: (128, 96, 4, 1)}
#: Score modifications need registers, too. At 16k keys, D=64, us: a window of 4096 773
#: (784 with 128x96 and one stage, 774 with 128x128), key padding 3511 (3281, 3758).
_LARGE_SMEM_SCORES: Final[_Table] = {**_LARGE_SMEM, 64: (128, 64, 4, 2), 128: (128, 64, 4, 1)}
#: Score modifications with a full or causal mask.
_LARGE_SMEM_CHANGES: Final[_Table] = {**_LARGE_SMEM_SCORES, 64: (128, 96, 4, 1)}
_MEDIUM_SMEM_SCORES: Final[_Table] = {**_MEDIUM_SMEM, 64: (128, 64, 4, 2)}
#: sm_100: not measured; 128x128 would spill 68 bytes there.
_UNTUNED_LARGE_SMEM: Final[_Table] = {**_LARGE_SMEM, 64: (128, 64, 4, 2)}
_TABLES: Final = {
    80: _MEDIUM_SMEM,
    87: _MEDIUM_SMEM,
    90: _LARGE_SMEM,
    100: _UNTUNED_LARGE_SMEM,
    103: _UNTUNED_LARGE_SMEM,
}
_WITH_SCORES: Final = {
    80: _MEDIUM_SMEM_SCORES,
    87: _MEDIUM_SMEM_SCORES,
    90: _LARGE_SMEM_SCORES,
}
#: Loads of single elements need registers for their addresses: smaller steps from D=112 on.
_ELEMENT: Final[_Table] = {96: (128, 64, 4, 1), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1)}

#: fp32 inputs, on every architecture: 46 TFLOP/s at D=64 and 47 at D=128.
_FP32: Final[_Table] = {
    64: (64, 32, 4, 1),
    128: (128, 32, 8, 1),
    256: (64, 16, 4, 1),
}

#: fp32 inputs as two fp16 parts: 16 rows per warp, as both parts of P and the two-level accumulator
#: need registers. ms at 16k keys, full / causal, H200: D=128 16.62 / 8.44, 128x64 with eight warps
#: 16.73 / 8.51; D=64 8.75 / 4.38 and 8.97 / 4.43.
_SPLIT_FP32: Final[_Table] = {64: (64, 64, 4, 1), 128: (64, 64, 4, 1)}
#: fp32 inputs as two parts where only one CTA fits at D=128: eight warps. Not measured.
_SPLIT_FP32_MEDIUM_SMEM: Final[_Table] = {**_SPLIT_FP32, 128: (128, 64, 8, 1)}
_SPLIT_FP32_SMALL_SMEM: Final[_Table] = {**_SPLIT_FP32, 128: (128, 32, 8, 1)}
#: fp32 inputs as one fp16 part. D=128 7.25 / 3.85 ms, 128x64 with eight warps 7.84 / 4.22, two
#: stages 7.21 / 3.91; D=64 3.70 / 1.92, one stage 3.85 / 1.93, 64x64, which spills nothing, 3.76 /
#: 2.12.
_ROUNDED: Final[_Table] = {64: (128, 64, 4, 2), 128: (64, 64, 4, 1)}
_ROUNDED_UNTUNED: Final[_Table] = {**_ROUNDED, 64: (64, 64, 4, 2)}

#: INT8 Q and K. With 32 keys at D=128, and at D=64, Q is in registers (traits.cuh).
_IN_8_BITS: Final[_Table] = {64: (128, 64, 4, 2), 128: (128, 32, 4, 2), 256: (128, 64, 8, 1)}
_IN_8_BITS_SMALL_SMEM: Final[_Table] = {
    **_IN_8_BITS,
    128: (128, 32, 4, 1),
    256: (64, 64, 4, 1),
}
#: INT8 Q and K with fp16 accumulation: us at 16k keys, 16 heads, D=128, full / causal / a window of
#: 2048 keys, H200: 4136 / 2127 / 741, with 32 keys 4243 / 2190 / 806, one stage 4216 / 2182.
_IN_8_BITS_LARGE_SMEM: Final[_Table] = {**_IN_8_BITS, 128: (128, 64, 4, 2)}

#: Rows of the largest tile, which decides GQA packing.
_LARGEST_BLOCK_Q: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The tile of a forward kernel for a problem on an architecture."""

    block_q: int  #: rows of a CTA's query tile (after GQA packing)
    block_kv: int  #: keys of one step
    warps_q: int  #: warps side by side along the rows; each owns block_q / warps_q rows
    warps_kv: int  #: warps side by side along the keys of a step
    stages: int  #: K and V buffers; 1 takes two barriers a step, 2 or more one
    min_blocks_per_sm: int  #: of __launch_bounds__

    @property
    def num_threads(self) -> int:
        """Return the threads per CTA."""
        return 32 * self.warps_q * self.warps_kv


def holds_q(problem: Problem, tile: Tile) -> bool:
    """Return whether Q stays in registers; `traits.cuh` has the same rule."""
    dim = padded_head_dim(problem.head_dim)
    if not problem.numerics.is_quantized or dim > 128:
        return False
    if problem.numerics is Numerics.INT8_F16:
        return tile.block_kv <= (32 if dim > 64 else 64)
    has_gap = problem.mask in (MaskKind.WINDOW, MaskKind.LOCAL_STRIDE)
    return tile.stages > 1 and not has_gap


def smem_bytes(problem: Problem, tile: Tile) -> int:
    """Return the dynamic shared memory per CTA; `traits.cuh` asserts the same."""
    dim, dim_v = padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v)
    size = 2 * problem.numerics.num_parts or problem.dtype.bytes
    size_qk = 1 if problem.numerics.is_quantized else size
    s_q = tile.block_q * dim * size_qk
    if problem.numerics is Numerics.INT8_F16:
        # Parked fp16 sums and their row maxima; they reuse Q's space if Q is held in registers.
        s_two_level = tile.block_q * (2 * dim_v + 16)
        s_q = max(s_q, s_two_level) if holds_q(problem, tile) else s_q + s_two_level
    s_kv = tile.stages * tile.block_kv * (dim * size_qk + dim_v * size)
    # After the loop the same space holds the output tile, and the fp32 partial results (r_o, m, l)
    # of all warps that split the keys but the first.
    s_out = tile.block_q * dim_v * (2 if problem.out_dtype is not Dtype.FP32 else 0)
    s_combine = (tile.warps_kv - 1) * tile.block_q * (dim_v + 2) * 4
    # Then the work item of the CTA, and the gathered key rows.
    s_rows = 0
    if group := problem.gather_group:
        group = group if tile.num_threads >= 128 else 1
        batch = 8 if group == 16 else 4  # blocks looked up at once
        s_rows = 2 * batch * (tile.block_kv // group) * 16
        if problem.mask is MaskKind.BLOCK_LISTS:
            s_rows += 2 * batch * (tile.block_kv // 16) * 8
    # Then staged tiles of a bias and a dense mask, with padded rows.
    s_matrices = 0
    if problem.bias_staged is not Staging.OFF:
        wide = problem.bias is BiasKind.FP32 or problem.dtype is Dtype.FP32
        pitch = tile.block_kv * 4 + 32 if wide else tile.block_kv * 2 + 16
        rows = tile.block_q if problem.bias_staged is Staging.MATRIX else 1
        s_matrices += tile.stages * rows * pitch
    if problem.dense_staged is Staging.MATRIX:
        s_matrices += tile.stages * tile.block_q * (tile.block_kv + 16)
    return max(s_q + s_kv, s_out, s_combine) + 64 + s_rows + s_matrices


def max_smem_bytes(arch: str) -> int:
    """Return the maximum shared memory per CTA on `arch`, in bytes.

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
    """Choose the tile of `problem` on `arch` for a row class.

    Raises
    ------
    UnsupportedError
        `arch` is older than sm_80.
    """
    limit = max_smem_bytes(arch)
    if rows is RowClass.ROWS16:
        return _largest_that_fits(problem, arch, _rows16(problem, limit))
    if rows is RowClass.ROWS64:
        return _largest_that_fits(problem, arch, _rows64(problem, limit))
    dim = max(padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v))
    table = _TABLES.get(arch_number(arch), _SMALL_SMEM)
    if problem.numerics.is_quantized:
        table = _in_8_bits(problem, limit)
    elif problem.numerics.num_parts:
        table = _of_parts(problem, limit)
    elif problem.dtype is Dtype.FP32:
        table = _FP32
    elif problem.access is Access.ELEMENT:
        table = _ELEMENT
    elif problem.has_scores:
        table = _with_scores(problem, arch_number(arch), table)
    elif table is _LARGE_SMEM and not problem.is_uniform:
        table = _LARGE_SMEM_SEQ
    block_q, block_kv, warps_q, stages = next(row for top, row in table.items() if dim <= top)
    if problem.numerics is Numerics.INT8 and problem.gather_group and problem.has_scores:
        # Gathered V rows beside two key ranges: 128 rows and 32 keys would spill 4 to 44 bytes at
        # D=128, 64 keys 12 to 32 at D=256. Speed not measured.
        if dim > 128:
            block_kv = 32
        elif dim > 64:
            block_q, block_kv, stages = 64, 64, 1
    if problem.numerics in (Numerics.SPLIT_P, Numerics.F16_ACC):
        # The two-level accumulator, and with SPLIT_P both parts of P: half the rows per warp.
        if warps_q == 4 and block_q == 128:
            warps_q, block_kv, stages = 8, 64, 1 if dim > 64 else stages
        if dim > 192:
            block_kv = 32  # 64 keys would spill 8 to 128 bytes
    if problem.dropout is Switch.ON and dim > 64 and warps_q == 4:
        # Dropout's random numbers take registers: 64 keys would spill 24 to 292 bytes.
        block_kv, stages = min(block_kv, 32), 2
    if Staging.MATRIX in (problem.bias_staged, problem.dense_staged):
        # Two CTAs on a multiprocessor matter more than a second stage and wide blocks.
        if problem.dense_staged is Staging.MATRIX and dim > 64:
            block_kv = min(block_kv, 32)  # 64 keys would spill 264 bytes
        widths = [width for width in (block_kv, block_kv // 2) if width >= 16]
        candidates = [
            (budget, _tile(block_q, width, warps_q, 1, 1))
            for budget in (half_of(limit), limit)
            for width in widths
            if width >= 32 or budget == limit
        ]
        return _largest_that_fits(problem, arch, candidates)
    return _tile(block_q, block_kv, warps_q, 1, stages)


def _in_8_bits(problem: Problem, limit: int) -> _Table:
    """Return the tile table for INT8 Q and K."""
    if limit < _MEDIUM_SMEM_BYTES:
        return _IN_8_BITS_SMALL_SMEM
    if limit < _SMALLEST_LARGE_SMEM or problem.numerics is Numerics.INT8:
        return _IN_8_BITS
    # With sequences and windows or strides, 64 keys would spill 16 to 68 bytes.
    is_free = problem.is_uniform or not problem.has_scores
    return _IN_8_BITS_LARGE_SMEM if is_free else _IN_8_BITS


def _of_parts(problem: Problem, limit: int) -> _Table:
    """Return the tile table for fp32 inputs as fp16 parts."""
    is_padded = problem.key_padding is Switch.ON  # the larger tiles would spill 24 to 60 bytes
    if problem.numerics is Numerics.F16X1:
        return _ROUNDED if limit > _SMALLEST_LARGE_SMEM and not is_padded else _ROUNDED_UNTUNED
    if is_padded or limit < _MEDIUM_SMEM_BYTES:
        return _SPLIT_FP32_SMALL_SMEM
    return _SPLIT_FP32 if limit > _SMALLEST_LARGE_SMEM else _SPLIT_FP32_MEDIUM_SMEM


def _with_scores(problem: Problem, arch: int, plain: _Table) -> _Table:
    """Return the tile table for long queries with score modifications."""
    if plain is not _LARGE_SMEM or problem.mask not in (MaskKind.FULL, MaskKind.CAUSAL):
        return _WITH_SCORES.get(arch, plain)
    bare = replace(problem, sinks=Switch.OFF, fixed_shift=Switch.OFF)
    reads_bias = bare.bias is not BiasKind.NONE and bare.bias_staged is Staging.OFF
    if reads_bias or Switch.ON in (bare.relative_bias, bare.dense, bare.dropout):
        return _LARGE_SMEM_SCORES  # 96 keys would spill 20 to 96 bytes
    if bare.has_scores:
        return _LARGE_SMEM_CHANGES
    return plain if problem.is_uniform else _LARGE_SMEM_SEQ  # scores are unmodified


def _rows16(problem: Problem, limit: int) -> list[tuple[int, Tile]]:
    """List (budget in bytes, tile) candidates for up to 16 rows: four warps split the keys.

    Bytes in flight decide. 128 keys and 2 stages in all of a large shared memory read 4.6 TB/s of
    an H200's 4.6 at 64 x 8k; three stages of 64 keys in half of it, 4.56.
    """
    if problem.dtype is Dtype.FP32:
        deep = [
            (budget, _tile(16, 64, 1, 4, n)) for n in (2, 1) for budget in (half_of(limit), limit)
        ]
        return [*deep, (limit, _tile(16, 32, 1, 2, 1))]
    # Paged keys: a third stage hides the look-ups (491 us against 503 at 64 x 8k, pages of 16).
    stages = 3 if problem.gather_group else 2
    wide = [(limit, _tile(16, 128, 1, 4, stages))] if limit > _SMALLEST_LARGE_SMEM else []
    if problem.mask in (MaskKind.LOCAL_STRIDE, MaskKind.BLOCK_LISTS):
        wide = []  # a key block must lie within a pattern block, of 64 keys or more
    return [
        *wide,
        *((half_of(limit), _tile(16, 64, 1, 4, stages)) for stages in (3, 2)),
        *((limit, _tile(16, 64, 1, 4, stages)) for stages in (3, 2, 1)),
    ]


def _rows64(problem: Problem, limit: int) -> list[tuple[int, Tile]]:
    """List (budget in bytes, tile) candidates for up to 64 rows: 16 per warp, all keys.

    Two stages beat three by 4 % (4.2 TB/s against 4.05 at 8 x 16k, 32 rows, H200).
    """
    # fp32 keeps the second-level sums of a step in registers: 64 keys would spill.
    widths = (64, 32)
    if problem.dtype is Dtype.FP32:
        widths = (32, 16) if max(problem.head_dim, problem.head_dim_v) <= 128 else (16, 16)
    return [
        (budget, _tile(64, block_kv, 4, 1, stages))
        for block_kv in widths
        for budget, stages in ((half_of(limit), 2), (limit, 2), (limit, 1))
    ]


def _largest_that_fits(problem: Problem, arch: str, candidates: list[tuple[int, Tile]]) -> Tile:
    for budget, tile in candidates:
        if smem_bytes(problem, tile) <= budget:
            return tile
    raise InternalError(f"no tile of {candidates} fits {arch} for {problem}")


def half_of(limit: int) -> int:
    """Return the shared memory per CTA with two CTAs per multiprocessor."""
    return (limit + _RESERVED_SMEM_BYTES) // 2 - _RESERVED_SMEM_BYTES


def _tile(block_q: int, block_kv: int, warps_q: int, warps_kv: int, stages: int) -> Tile:
    return Tile(
        block_q=block_q,
        block_kv=block_kv,
        warps_q=warps_q,
        warps_kv=warps_kv,
        stages=stages,
        min_blocks_per_sm=1,
    )


def heads_per_tile(len_q: int, group: int) -> int:
    """Return the query heads packed into a tile: all of a kv head (`group`) or 1.

    Packing pays where one head's rows leave a good part of their last tile empty.
    """
    if group == 1:
        return 1
    alone = len_q / (-(-len_q // _LARGEST_BLOCK_Q) * _LARGEST_BLOCK_Q)
    rows = len_q * group
    packed = rows / (-(-rows // _LARGEST_BLOCK_Q) * _LARGEST_BLOCK_Q)
    return group if alone < 0.9 * packed or rows <= RowClass.ROWS64 else 1


#: Costs in key blocks: starting a CTA, and combining splits, by rows of a tile. One CTA combines,
#: in 60 to 100 us if it has 128 rows, where a key block takes 2.3 (4 x 128 queries on 1024 keys, 32
#: heads, D=128: 76 us with two splits, 37 with one).
_SPLIT_PROLOGUE: Final = 3.0
_COMBINE_COST: Final = {16: 4.0, 64: 12.0, 128: 45.0}


def combine_cost(block_q: int) -> float:
    """Return the cost of combining the splits of a tile, in units of key blocks."""
    return next(
        (cost for rows, cost in _COMBINE_COST.items() if block_q <= rows), _COMBINE_COST[128]
    )


@functools.lru_cache(maxsize=4096)
def choose_splits(
    num_tiles: int, num_kv_blocks: int, num_slots: int, combine_cost: float = _COMBINE_COST[16]
) -> int:
    """Choose the number of CTAs that share the keys of a query tile.

    Parameters
    ----------
    num_tiles : int
        Query tiles of all heads and batches.
    num_kv_blocks : int
        Key blocks of the longest tile.
    num_slots : int
        CTAs that the GPU holds at a time.
    combine_cost : float
        Time of a merge, in key blocks.
    """
    if num_kv_blocks <= 4 or num_tiles >= 0.8 * num_slots:
        return 1
    best, best_cost = 1, float(num_kv_blocks + _SPLIT_PROLOGUE)
    for waves in (1, 2, 3):
        splits = min(waves * num_slots // num_tiles, num_kv_blocks // 2, 128)
        if splits < 2:
            continue
        used = -(-num_kv_blocks // -(-num_kv_blocks // splits))  # without empty splits
        cost = -(-num_tiles * used // num_slots) * (-(-num_kv_blocks // used) + _SPLIT_PROLOGUE)
        cost += combine_cost + 0.1 * used
        if cost < best_cost:
            best, best_cost = used, cost
    return best

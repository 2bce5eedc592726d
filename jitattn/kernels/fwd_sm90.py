"""The forward kernel on wgmma and TMA, for sm_90: its spec, tiles, and the calls that it serves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from jitattn.kernels.fwd_arguments import FWD_TABLES, fwd_arguments, fwd_structs
from jitattn.kernels.matrix import ALL_DIMS, FEATURES, LAYOUTS, MODEL_DIMS, problem
from jitattn.kernels.problem_spec import ProblemSpec
from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable
from jitattn.spec.enums import (
    Access,
    BiasKind,
    Dtype,
    MaskKind,
    MatrixSize,
    Numerics,
    RowClass,
    SeqLayout,
    Switch,
)
from jitattn.spec.kernel_spec import KernelSpec, Problem, arch_number, padded_head_dim

#: Further parameters: tiles are drawn from a counter.
PERSISTENT: Final = ArgumentStruct(
    "PersistentParams",
    (
        Argument("tile_counter", "int32_t*", "[1], 0, and so left behind"),
        Argument("num_items", "int32_t", "tiles and splits of all heads"),
        Argument("section_heads", "int32_t", "head tiles that are visited together"),
        Argument("piece_rows", "int32_t", "rows of a key block that are copied at once"),
    ),
    base="Base",
)


@functools.lru_cache(1024)
def _extended(forward: ArgumentTable) -> ArgumentTable:
    return forward.extended(PERSISTENT)


_TABLES: Final = tuple(map(_extended, FWD_TABLES))

#: Columns of a page: 128 bytes, the widest swizzle.
PAGE: Final = 64
#: Keys of a block at D=256, and where not all are seen: 64 fit causal tiles better.
_WIDE_KEYS: Final = 80
_WIDE_MASKED_KEYS: Final = 64
#: (block_kv, consumers, stages, q_stages) by the largest padded head dim that the rows serve; the
#: first for many queries. TFLOP/s, bf16, full / causal at 16k keys, H200: D=64 558 / 515, two
#: consumers 414 / 432 (of 1k keys, causal, 268 / 294), 112 keys 486 / 448; D=128 672 / 639, with
#: 112 keys 614 / 573, one stage of Q 618 / 586; D=256 748 / 621, with 64 keys 702 / 628.
_TILES: Final[dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    64: ((128, 3, 4, 2), (128, 2, 4, 2)),
    128: ((128, 2, 2, 2),),
    192: ((112, 2, 2, 1),),
    256: ((_WIDE_KEYS, 2, 2, 1),),
}
#: The same for fp32 as two fp16 parts: 64 keys share a scale, and the output has two sums. TFLOP/s,
#: full / causal at 16k keys, and those of mma.sync: D=64 205 / 198 (123 / 112), D=128 216 / 200
#: (124 / 119); one part 417 / 377 (303 / 281), 457 / 467 (296 / 285). Twice the stages with one.
_TILES_OF_PARTS: Final[dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    64: ((64, 3, 3, 1), (64, 2, 4, 2)),
    128: ((64, 2, 2, 1),),
}
#: Blocks of a local + stride pattern hold 64 keys or more, and whole kernel blocks. TFLOP/s of seen
#: pairs, D=128, 16 and 32 local blocks of 8k keys: four stages 480 / 493, two 438 / 484.
_STRIDE_KEYS: Final = 64
#: Query rows of two consumers.
_BLOCK_Q_OF_TWO: Final = 128
#: Dropout's random numbers take registers.
_DROPOUT_KEYS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sm90Tile:
    """The tile of a forward kernel: 64 rows for each consumer warpgroup."""

    block_q: int
    block_kv: int  #: keys of one step
    warps_q: int  #: warps of the consumers
    warps_kv: int  #: 1
    stages: int  #: K and V buffers
    q_stages: int  #: Q buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class FwdSm90Spec(ProblemSpec):
    """Spec of the forward kernel on wgmma and TMA."""

    family: ClassVar[str] = "fwd_sm90"
    tensor_maps: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    problem: Problem
    tile: Sm90Tile
    arch: str  #: "sm_90a"

    @property
    def num_threads(self) -> int:
        """Return the threads per CTA, with the producer's."""
        return 32 * self.tile.warps_q + 128

    @property
    def smem_bytes(self) -> int:
        """Return the dynamic shared memory per CTA in bytes."""
        return smem_bytes(self.problem, self.tile)

    @property
    def arguments(self) -> ArgumentTable:
        """Return the parameter struct of this kernel."""
        return _extended(fwd_arguments(self.problem))

    @property
    def structs(self) -> tuple[ArgumentStruct, ...]:
        """Return the structs of the generated header."""
        return (*fwd_structs(self.problem), PERSISTENT)

    @classmethod
    def tables(cls) -> tuple[ArgumentTable, ...]:
        """Return the parameter structs of this family."""
        return _TABLES

    def _prebuild(self) -> str:
        return "jitattn-cache prebuild --arch 90"

    @classmethod
    def of_calls(
        cls,
        problem: Problem,
        gear: int | None,
        arch: str,
        rows: Sequence[RowClass],
        **options: Any,  # noqa: ANN401 - there are none
    ) -> Iterator[KernelSpec]:
        """Yield the kernel of long queries, on the architecture that has it."""
        del gear, options
        if arch_number(arch) != 90 or RowClass.MANY not in rows:
            return
        if refusal_of_problem(problem) is None:
            yield from fwd_sm90_specs(problem)

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        if arch_number(arch) != 90:
            return
        for one in _problems(size):
            if refusal_of_problem(one) is None:
                yield from fwd_sm90_specs(one)


def smem_bytes(problem: Problem, tile: Sm90Tile) -> int:
    """Return the dynamic shared memory per CTA; `fwd/sm90/traits.cuh` asserts the same."""
    dim, dim_v = padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v)
    parts = max(1, problem.numerics.num_parts)
    pages, pages_v = parts * -(-dim // PAGE), parts * -(-dim_v // PAGE)
    s_q = tile.block_q * pages * 2 * PAGE
    s_kv = tile.block_kv * (pages + pages_v) * 2 * PAGE
    barriers = 8 * (2 * tile.q_stages + 4 * tile.stages)
    s_merge = 8 * tile.block_q + 8
    has_lists = problem.mask is MaskKind.BLOCK_LISTS
    plans = (128 if has_lists else 64) * (tile.q_stages + 2)
    listed = (tile.stages + 1) * tile.block_kv // 16 * 8 if has_lists else 0
    return tile.q_stages * s_q + tile.stages * s_kv + plans + listed + s_merge + barriers


def refusal_of_problem(problem: Problem) -> str | None:
    """Return why a problem has no kernel here; None if it has one."""
    if problem.numerics is not Numerics.F32_ACC and not problem.numerics.num_parts:
        return f"numerics {problem.numerics.value} are those of mma.sync kernels"
    if problem.access is not Access.VEC16:
        return "TMA copies multiples of 16 bytes"
    if problem.kv_layout is SeqLayout.PAGED:
        return "pages of other sizes than multiples of 16 are gathered by mma.sync kernels"
    if problem.mask is MaskKind.FINE_STRIDE:
        return "keys of small blocks on a stride are gathered by mma.sync kernels"
    if problem.bias is not BiasKind.NONE or problem.dense is Switch.ON:
        return "biases and dense masks are staged by mma.sync kernels"
    if problem.mask is MaskKind.BLOCK_LISTS and Switch.ON in (problem.alibi, problem.relative_bias):
        return "a term by distance begins the sums of mma.sync kernels, as in their gradients"
    return None


@functools.lru_cache(maxsize=1024)
def fwd_sm90_specs(problem: Problem) -> tuple[FwdSm90Spec, ...]:
    """Return the specs of the forward kernels of `problem` on sm_90, by decreasing tile height."""
    dim = max(padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v))
    tiles = _TILES_OF_PARTS if problem.numerics.num_parts else _TILES
    rows = next(rows for top, rows in tiles.items() if dim <= top)
    # Lists begin at powers of two; functions and relative biases take registers that three do not
    # have.
    takes_registers = bool(problem.function) or problem.relative_bias is Switch.ON
    needs_two = problem.mask is MaskKind.BLOCK_LISTS or takes_registers
    return tuple(
        FwdSm90Spec(problem=problem, tile=tile, arch="sm_90a")
        for tile in itertools.starmap(functools.partial(_tile, problem), rows)
        if not needs_two or tile.block_q == _BLOCK_Q_OF_TWO
    )


def _tile(problem: Problem, block_kv: int, consumers: int, stages: int, q_stages: int) -> Sm90Tile:
    if problem.numerics.num_parts:
        stages *= 2 // problem.numerics.num_parts
    elif problem.mask is MaskKind.LOCAL_STRIDE:
        stages = min(4, stages * block_kv // _STRIDE_KEYS)
        block_kv = _STRIDE_KEYS
    elif problem.mask is not MaskKind.FULL and block_kv == _WIDE_KEYS:
        block_kv = _WIDE_MASKED_KEYS
    elif problem.dropout is Switch.ON and consumers == 3:
        block_kv = _DROPOUT_KEYS
    return Sm90Tile(
        block_q=64 * consumers,
        block_kv=block_kv,
        warps_q=4 * consumers,
        warps_kv=1,
        stages=stages,
        q_stages=q_stages,
    )


def _problems(size: MatrixSize) -> Iterator[Problem]:
    masks = (MaskKind.FULL, MaskKind.CAUSAL)
    for dim, mask in itertools.product((64, 128, 256), masks):
        yield problem(Dtype.BF16, dim, mask)
    yield problem(Dtype.FP16, 128)
    yield problem(Dtype.BF16, 192, head_dim_v=128)
    yield problem(Dtype.FP32, 128, numerics=Numerics.F16X3)
    if size >= MatrixSize.TUNED:
        for dim in MODEL_DIMS:
            yield problem(Dtype.BF16, dim)
        for (q_layout, kv_layout), dim in itertools.product(LAYOUTS, (64, 128)):
            yield problem(Dtype.BF16, dim, q_layout=q_layout, kv_layout=kv_layout)
        for features, dim in itertools.product(FEATURES, (64, 128, 256)):
            yield problem(Dtype.BF16, dim, **features)
        parts = (Numerics.F16X3, Numerics.F16X1)
        for numerics, dim, mask in itertools.product(parts, (16, 64, 80, 128), masks):
            yield problem(Dtype.FP32, dim, mask, numerics=numerics)
    if size is MatrixSize.FULL:
        dtypes = (Dtype.FP16, Dtype.BF16)
        for dtype, mask, dim in itertools.product(dtypes, masks, ALL_DIMS):
            yield problem(dtype, dim, mask)

"""The backward kernel on wgmma and TMA, for sm_90: its spec, tiles, and the calls it serves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Final

from jitattn.kernels.bwd_arguments import BWD_TABLES, bwd_arguments, bwd_structs
from jitattn.kernels.bwd_postprocess import BwdPostprocessSpec
from jitattn.kernels.bwd_tiles import backward_problem
from jitattn.kernels.matrix import BACKWARD_FEATURES, problem
from jitattn.kernels.problem_spec import ProblemSpec
from jitattn.kernels.sum_parts import SumPartsSpec
from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable
from jitattn.spec.enums import (
    Access,
    Dtype,
    MaskKind,
    MatrixSize,
    Numerics,
    RowClass,
    SeqLayout,
    Switch,
)
from jitattn.spec.kernel_spec import KernelSpec, Problem, arch_number, padded_head_dim

#: Further parameters beside those of the mma.sync kernel.
BWD_SM90: Final = ArgumentStruct(
    "BwdSm90Params",
    (
        Argument("section_heads", "int32_t", "kv heads of all sequences that are visited together"),
        Argument("unused", "int32_t", "nothing: structs are multiples of 8 bytes"),
    ),
    base="Base",
)


@functools.lru_cache(1024)
def _extended(backward: ArgumentTable) -> ArgumentTable:
    return backward.extended(BWD_SM90)


#: Columns of a page: 128 bytes, the widest swizzle.
_PAGE: Final = 64
#: Largest head dim: dK and dV of 64 keys stay in the registers of a warpgroup.
_MOST_DIM: Final = 128
_STAGES, _SLOTS = 3, 2
#: Warps along the rows of a block of dQ sums, and its rows: as the postprocess kernel reads them.
_DQ_WARPS, _DQ_ROWS = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BwdSm90Tile:
    """The tile of a backward kernel: two warpgroups with 64 keys each."""

    block_q: int  #: rows of a step
    block_kv: int  #: keys of a CTA
    piece_columns: int  #: of dQ that are computed at a time
    overlaps: Switch  #: dP is computed beside the exponentials
    stats_by_mma: Switch  #: LSE and delta are subtracted by one more step of products


#: By the largest padded head dim that they serve. TFLOP/s, bf16, full / causal at 16k keys, H200:
#: D=64 538 / 522, LSE and delta as numbers 528 / 507, 64 rows 473 / 453; D=128 584 / 563, in pieces
#: of 32 columns 551 / 528, these with overlap 520 / 517, and LSE and delta by products 515 / 531.
_TILES: Final = {
    64: BwdSm90Tile(
        block_q=128, block_kv=128, piece_columns=32, overlaps=Switch.ON, stats_by_mma=Switch.ON
    ),
    128: BwdSm90Tile(
        block_q=64, block_kv=128, piece_columns=64, overlaps=Switch.OFF, stats_by_mma=Switch.OFF
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BwdSm90Spec(ProblemSpec):
    """Spec of the backward kernel on wgmma and TMA: dK, dV, and fp32 sums of dQ."""

    family: ClassVar[str] = "bwd_sm90"
    options: ClassVar[Mapping[str, tuple[StrEnum, ...]]] = {"deterministic": (Switch.OFF,)}
    tensor_maps: ClassVar[tuple[str, ...]] = ("q", "k", "v", "d_out")
    problem: Problem  #: as `backward_problem` has it
    tile: BwdSm90Tile
    deterministic: Switch  #: key blocks add to dQ in fixed order
    arch: str  #: "sm_90a"

    @property
    def num_threads(self) -> int:
        """Return the threads per CTA: those that own keys, and a warpgroup for copies and dQ."""
        return 2 * self.tile.block_kv + 128

    @property
    def smem_bytes(self) -> int:
        """Return the dynamic shared memory per CTA in bytes."""
        return smem_bytes(self.problem, self.tile)

    @property
    def arguments(self) -> ArgumentTable:
        """Return the parameter struct of this kernel."""
        return _extended(bwd_arguments(self.problem))

    @property
    def structs(self) -> tuple[ArgumentStruct, ...]:
        """Return the structs of the generated header."""
        return (*bwd_structs(self.problem), BWD_SM90)

    @classmethod
    def tables(cls) -> tuple[ArgumentTable, ...]:
        """Return the parameter structs of this family."""
        return tuple(map(_extended, BWD_TABLES))

    @property
    def in_fragments(self) -> bool:
        """Return whether the sums of dQ are stored in MMA fragment order."""
        return _in_fragments(self.problem)

    @property
    def dq_columns(self) -> int:
        """Return the columns of a query tile's sums in fragment order."""
        return padded_head_dim(self.problem.head_dim)

    @property
    def dq_spec(self) -> BwdPostprocessSpec | SumPartsSpec:
        """Return the spec of the kernel that converts the fp32 sums to dQ."""
        dtype, dim = self.problem.dtype, self.problem.head_dim
        arch = self.arch.removesuffix("a")
        if not self.in_fragments:
            return SumPartsSpec(dtype=dtype, head_dim=dim, arch=arch)
        return BwdPostprocessSpec(
            dtype=dtype,
            head_dim=dim,
            block_q=_DQ_ROWS,
            num_warps=_DQ_WARPS,
            warps_dq=_DQ_WARPS,
            arch=arch,
        )

    def _prebuild(self) -> str:
        return "jitattn-cache prebuild --arch 90"

    @classmethod
    def of_calls(
        cls,
        problem: Problem,
        gear: int | None,
        arch: str,
        rows: Sequence[RowClass],
        **options: Any,  # noqa: ANN401 - of the type of each field
    ) -> Iterator[KernelSpec]:
        """Yield the kernel of a backward pass, on the architecture that has it."""
        del gear, rows
        deterministic = options["deterministic"] is Switch.ON
        reason = refusal_of_backward(problem, deterministic=deterministic)
        if arch_number(arch) != 90 or reason is not None:
            return
        spec = bwd_sm90_spec(problem, deterministic=deterministic)
        yield spec
        yield spec.dq_spec

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        if arch_number(arch) != 90:
            return
        for one in _problems(size):
            for deterministic in (False, True)[: 1 + (one.mask is MaskKind.FULL)]:
                spec = bwd_sm90_spec(one, deterministic=deterministic)
                yield spec
                yield spec.dq_spec


def smem_bytes(problem: Problem, tile: BwdSm90Tile) -> int:
    """Return the dynamic shared memory per CTA; `bwd/sm90/traits.cuh` asserts the same."""
    dims = (padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v))
    row = sum(-(-dim // _PAGE) for dim in dims) * 2 * _PAGE
    s_operands = (tile.block_kv + _STAGES * tile.block_q) * row
    s_ds = _SLOTS * tile.block_q // _PAGE * tile.block_kv * 2 * _PAGE
    pieces = -(-dims[0] // tile.piece_columns) * tile.block_q // _DQ_ROWS
    buffers = 0 if not _in_fragments(problem) else 2 if pieces % 2 == 0 else 1
    s_pieces = buffers * _DQ_ROWS * tile.piece_columns * 4
    s_stats = _STAGES * 2 * 4 * tile.block_q
    if tile.stats_by_mma is Switch.ON:
        s_stats = (_STAGES * tile.block_q + 2 * _DQ_ROWS) * 32
    return s_operands + s_ds + s_pieces + s_stats + 8 * (1 + 2 * _STAGES + 2 * _SLOTS)


def refusal_of_backward(problem: Problem, *, deterministic: bool = False) -> str | None:
    """Return why the gradients of a problem have no kernel here; None if they have one."""
    problem = backward_problem(problem)
    if problem.numerics is not Numerics.F32_ACC or problem.dtype is Dtype.FP32:
        return f"numerics {problem.numerics.value} are those of mma.sync kernels"
    if problem.access is not Access.VEC16:
        return "TMA copies multiples of 16 bytes"
    if max(problem.head_dim, problem.head_dim_v) > _MOST_DIM:
        return f"dK and dV of head dims above {_MOST_DIM} do not fit a warpgroup's registers"
    if problem.kv_layout not in (SeqLayout.BATCHED, SeqLayout.RAGGED):
        return "pages are gathered by mma.sync kernels"
    if deterministic and problem.mask is MaskKind.LOCAL_STRIDE:
        return "mma.sync kernels count the key blocks before of a local + stride pattern"
    if problem.mask in (MaskKind.FINE_STRIDE, MaskKind.BLOCK_LISTS):
        return "listed and gathered keys are those of mma.sync kernels"
    if replace(problem, mask=MaskKind.FULL, key_padding=Switch.OFF, sinks=Switch.OFF).has_scores:
        return "what changes scores is computed by mma.sync kernels"
    return None


@functools.lru_cache(maxsize=1024)
def bwd_sm90_spec(problem: Problem, *, deterministic: bool = False) -> BwdSm90Spec:
    """Return the spec of the backward kernel of a forward problem that is not refused."""
    problem = backward_problem(problem)
    return BwdSm90Spec(
        problem=problem,
        tile=_tile(problem),
        deterministic=Switch.ON if deterministic else Switch.OFF,
        arch="sm_90a",
    )


def _tile(problem: Problem) -> BwdSm90Tile:
    dim = max(padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v))
    return next(tile for top, tile in _TILES.items() if dim <= top)


def _in_fragments(problem: Problem) -> bool:
    return problem.q_layout is SeqLayout.BATCHED is problem.kv_layout


def _problems(size: MatrixSize) -> Iterator[Problem]:
    masks = (MaskKind.FULL, MaskKind.CAUSAL)
    for dim, mask in itertools.product((64, 128), masks):
        yield problem(Dtype.BF16, dim, mask)
    yield problem(Dtype.FP16, 128)
    if size >= MatrixSize.TUNED:
        for dim in (16, 32, 40, 72, 80, 96, 112):
            yield problem(Dtype.BF16, dim)
        yield problem(Dtype.BF16, 128, head_dim_v=64)
        for dim, features in itertools.product((64, 128), BACKWARD_FEATURES):
            asked = problem(Dtype.BF16, dim, **features)
            if refusal_of_backward(asked) is None:
                yield asked
    if size is MatrixSize.FULL:
        for mask, dim in itertools.product(masks, range(8, _MOST_DIM + 1, 8)):
            yield from (problem(dtype, dim, mask) for dtype in (Dtype.FP16, Dtype.BF16))

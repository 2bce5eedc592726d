"""The forward kernel: its spec, and the variants that calls need."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jitattn.kernels.fwd_arguments import FWD_TABLES, fwd_arguments, fwd_structs
from jitattn.kernels.fwd_sm90 import FwdSm90Spec, refusal_of_problem
from jitattn.kernels.matrix import (
    ALL_DIMS,
    FEATURES,
    LAYOUTS,
    MODEL_DIMS,
    masks_of,
    problem,
    problems_in_8_bits,
    split_fp32_problems,
)
from jitattn.kernels.operands import problem_in_8_bits, split_fp32_problem
from jitattn.kernels.problem_spec import ProblemSpec
from jitattn.kernels.quantize import quantize_specs
from jitattn.kernels.split_fp32 import split_fp32_spec
from jitattn.kernels.tiles import Tile, choose_tile, smem_bytes
from jitattn.spec.arguments import ArgumentStruct, ArgumentTable
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
from jitattn.spec.kernel_spec import KernelSpec, Problem, arch_number
from jitattn.values.gears import FAST_FP16_ACC_ARCHS, resolve_numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class FwdSpec(ProblemSpec):
    """Spec of the forward kernel."""

    family: ClassVar[str] = "fwd"
    problem: Problem
    tile: Tile
    arch: str  #: "sm_80", "sm_90" …

    @property
    def num_threads(self) -> int:
        """Return the threads per CTA."""
        return self.tile.num_threads

    @property
    def smem_bytes(self) -> int:
        """Return the dynamic shared memory per CTA in bytes."""
        return smem_bytes(self.problem, self.tile)

    @property
    def arguments(self) -> ArgumentTable:
        """Return the parameter struct of this kernel."""
        return fwd_arguments(self.problem)

    @property
    def structs(self) -> tuple[ArgumentStruct, ...]:
        """Return the structs of the generated header."""
        return fwd_structs(self.problem)

    @classmethod
    def tables(cls) -> tuple[ArgumentTable, ...]:
        """Return the parameter structs of this family."""
        return FWD_TABLES

    def to_choice(self) -> dict[str, str | int]:
        """Return the choice for exactly this kernel; its row class determines the tile."""
        same = (row for row in RowClass if fwd_spec(self.problem, self.arch, row) == self)
        return {**ProblemSpec.to_choice(self), "rows": next(same, RowClass.MANY).name.lower()}

    @classmethod
    def of_calls(
        cls,
        problem: Problem,
        gear: int | None,
        arch: str,
        rows: Sequence[RowClass],
        **options: Any,  # noqa: ANN401 - there are none
    ) -> Iterator[KernelSpec]:
        """Yield the kernels that calls of a gear may need, depending on GPU and lengths."""
        del options
        problem = listed_problem(problem)
        numerics = {problem.numerics}
        if gear is not None and arch in FAST_FP16_ACC_ARCHS:
            numerics.add(resolve_numerics(gear, problem.dtype, has_fast_fp16_acc=True))
        for one, row in itertools.product(sorted(numerics), rows):
            yield fwd_spec(replace(problem, numerics=one), arch, row)
        yield from FwdSm90Spec.of_calls(problem, gear, arch, rows)
        if gear is not None and RowClass.MANY in rows:
            yield from specs_for_gear(problem, gear, arch)

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        if size is MatrixSize.FULL:
            masks = (MaskKind.FULL, MaskKind.CAUSAL)
            for dtype, rows, mask, dim in itertools.product(Dtype, RowClass, masks, ALL_DIMS):
                yield fwd_spec(problem(dtype, dim, mask), arch, rows)
        if size >= MatrixSize.TUNED:
            yield from _rows_of_tables(arch)
            yield from _gears(arch)
        yield from _short(arch)


@functools.lru_cache(maxsize=1024)
def fwd_spec(problem: Problem, arch: str, rows: RowClass) -> FwdSpec:
    """Return the spec of the forward kernel of `problem` on `arch`."""
    return FwdSpec(problem=problem, tile=choose_tile(problem, arch, rows), arch=arch)


def listed_problem(problem: Problem) -> Problem:
    """Replace a mask that only backward kernels compute directly by block lists."""
    if problem.mask is MaskKind.FINE_STRIDE:
        return replace(problem, mask=MaskKind.BLOCK_LISTS)
    return problem


def specs_for_gear(problem: Problem, gear: int, arch: str) -> list[KernelSpec]:
    """Return the kernels for prepared operands that calls of a gear may need."""
    is_faster = arch_number(arch) == 90 and refusal_of_problem(problem) is None
    in_8_bits = problem_in_8_bits(problem, arch) if gear == 4 and not is_faster else None
    if in_8_bits is not None:
        return [*quantize_specs(in_8_bits, arch), fwd_spec(in_8_bits, arch, RowClass.MANY)]
    split_fp32 = split_fp32_problem(problem)
    if split_fp32 is not None:
        on_wgmma = FwdSm90Spec.of_calls(split_fp32, None, arch, [RowClass.MANY])
        split = split_fp32_spec(split_fp32, arch)
        return [split, fwd_spec(split_fp32, arch, RowClass.MANY), *on_wgmma]
    return []


def _rows_of_tables(arch: str) -> Iterator[KernelSpec]:
    """Yield problems of all tile-table rows, common head dims, layouts, masks and the like."""
    for dtype in (Dtype.BF16, Dtype.FP32):
        for rows in RowClass:
            # Of head dims with equal tiles the largest needs the most registers and shared memory.
            largest = {}
            for dim in ALL_DIMS:
                spec = fwd_spec(problem(dtype, dim), arch, rows)
                largest[spec.tile] = spec
            yield from largest.values()
    for dim in MODEL_DIMS:
        yield fwd_spec(problem(Dtype.BF16, dim), arch, RowClass.MANY)
    for (q_layout, kv_layout), dim, rows in itertools.product(LAYOUTS, (64, 128), RowClass):
        pair = problem(Dtype.BF16, dim, q_layout=q_layout, kv_layout=kv_layout)
        yield fwd_spec(pair, arch, rows)
    for features in FEATURES:
        for dim, rows in ((64, RowClass.MANY), (128, RowClass.MANY), (128, RowClass.ROWS16)):
            yield fwd_spec(problem(Dtype.BF16, dim, **features), arch, rows)


def _gears(arch: str) -> Iterator[KernelSpec]:
    """Yield problems of non-default gears; fp16 accumulators where calls can select them."""
    many, ragged = RowClass.MANY, SeqLayout.RAGGED
    kinds = [(Dtype.BF16, Numerics.SPLIT_P), (Dtype.FP32, Numerics.TF32)]
    if arch in ("sm_86", "sm_89"):
        kinds.append((Dtype.FP16, Numerics.F16_ACC))
    for dtype, numerics in kinds:
        for dim in (64, 128, 192, 256):
            yield fwd_spec(problem(dtype, dim, numerics=numerics), arch, many)
        causal = problem(dtype, 128, numerics=numerics)
        for mask in (MaskKind.FULL, MaskKind.WINDOW):
            yield fwd_spec(replace(causal, mask=mask), arch, many)
        yield fwd_spec(replace(causal, q_layout=ragged, kv_layout=ragged), arch, many)
        for rows in (RowClass.ROWS16, RowClass.ROWS64):
            yield fwd_spec(causal, arch, rows)
    for in_8_bits in problems_in_8_bits(arch):
        yield fwd_spec(in_8_bits, arch, many)
    for split_fp32 in split_fp32_problems():
        if split_fp32.head_dim != split_fp32.head_dim_v:
            yield fwd_spec(split_fp32, arch, many)
            continue
        for masked in masks_of(split_fp32):
            yield fwd_spec(masked, arch, many)
        if split_fp32.head_dim in (64, 128):
            full = replace(split_fp32, mask=MaskKind.FULL, key_padding=Switch.ON)
            yield fwd_spec(full, arch, many)


def _short(arch: str) -> Iterator[KernelSpec]:
    many, bf16 = RowClass.MANY, Dtype.BF16
    for dim in (64, 128):
        yield fwd_spec(problem(bf16, dim), arch, many)
        yield fwd_spec(problem(bf16, dim, MaskKind.FULL), arch, many)
    for rows in (RowClass.ROWS16, RowClass.ROWS64):
        yield fwd_spec(problem(bf16, 128), arch, rows)
    yield fwd_spec(problem(Dtype.FP16, 128), arch, many)
    yield fwd_spec(problem(Dtype.FP32, 128), arch, many)
    yield fwd_spec(problem(bf16, 128, out_dtype=Dtype.FP32), arch, many)
    yield fwd_spec(problem(bf16, 192, head_dim_v=128), arch, many)
    for dim in (7, 128):
        yield fwd_spec(problem(bf16, dim, access=Access.ELEMENT), arch, many)
    yield fwd_spec(problem(Dtype.FP32, 33, access=Access.ELEMENT), arch, many)

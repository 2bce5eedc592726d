"""The backward kernel: its spec, and the kernels of a backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

from jitattn.kernels.bwd_arguments import BWD_TABLES, bwd_arguments, bwd_structs
from jitattn.kernels.bwd_postprocess import BwdPostprocessSpec
from jitattn.kernels.bwd_preprocess import bwd_preprocess_specs
from jitattn.kernels.bwd_sm90 import BwdSm90Spec
from jitattn.kernels.bwd_tiles import BwdTile, backward_problem, choose_tile, smem_bytes
from jitattn.kernels.kv_scatter import ScatterSpec
from jitattn.kernels.matrix import BACKWARD_FEATURES, problem
from jitattn.kernels.operands import split_fp32_backward
from jitattn.kernels.problem_spec import ProblemSpec
from jitattn.kernels.split_fp32 import split_fp32_spec
from jitattn.kernels.sum_parts import SumPartsSpec
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
from jitattn.spec.kernel_spec import KernelSpec, Problem, padded_head_dim


class BackwardSpec(ProblemSpec):
    """Base of the specs with a backward tile and the backward kernel's arguments."""

    __slots__ = ()
    problem: Problem
    tile: BwdTile

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
        return bwd_arguments(self.problem)

    @property
    def structs(self) -> tuple[ArgumentStruct, ...]:
        """Return the structs of the generated header."""
        return bwd_structs(self.problem)

    @classmethod
    def tables(cls) -> tuple[ArgumentTable, ...]:
        """Return the parameter structs of this family."""
        return BWD_TABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class BwdSpec(BackwardSpec):
    """Spec of the backward kernel: dK, dV, and fp32 sums of dQ."""

    family: ClassVar[str] = "bwd"
    options: ClassVar[Mapping[str, tuple[StrEnum, ...]]] = {"deterministic": (Switch.OFF,)}
    problem: Problem  #: as `backward_problem` has it
    tile: BwdTile
    deterministic: Switch  #: key blocks add to dQ in fixed order
    arch: str

    @property
    def in_fragments(self) -> bool:
        """Return whether the sums of dQ are stored in MMA fragment order."""
        return self.problem.q_layout == self.problem.kv_layout == SeqLayout.BATCHED

    @property
    def dq_columns(self) -> int:
        """Return the columns of a query tile's sums in fragment order."""
        across = self.tile.num_warps // self.tile.warps_dq
        units = padded_head_dim(self.problem.head_dim) // 16
        return across * -(-units // across) * 16

    @classmethod
    def of_calls(
        cls,
        problem: Problem,
        gear: int | None,
        arch: str,
        rows: Sequence[RowClass],
        **options: Any,  # noqa: ANN401 - of the type of each field
    ) -> Iterator[KernelSpec]:
        """Yield the kernels that a backward pass may need, depending on lengths."""
        del gear, rows
        deterministic = options["deterministic"] is Switch.ON
        yield from specs_of_backward(problem, arch, deterministic=deterministic)

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family and of its dQ postprocess kernels."""
        if size >= MatrixSize.TUNED:
            yield from _in_16_bits(arch)
            yield from _in_fp32(arch)
        yield from specs_of_backward(problem(Dtype.BF16, 64), arch)
        yield from specs_of_backward(problem(Dtype.FP32, 33, access=Access.ELEMENT), arch)


def bwd_spec(problem: Problem, arch: str, *, deterministic: bool = False) -> BwdSpec:
    """Return the spec of the backward kernel of a forward problem on `arch`.

    Raises
    ------
    UnsupportedError
        `arch` is older than sm_80.
    """
    problem = backward_problem(problem)
    switch = Switch.ON if deterministic else Switch.OFF
    tile = choose_tile(problem, arch)
    return BwdSpec(problem=problem, tile=tile, deterministic=switch, arch=arch)


def dq_spec(spec: BwdSpec) -> BwdPostprocessSpec | SumPartsSpec:
    """Return the spec of the kernel that converts the fp32 sums to dQ."""
    problem, tile = spec.problem, spec.tile
    if not spec.in_fragments:
        return SumPartsSpec(dtype=problem.dtype, head_dim=problem.head_dim, arch=spec.arch)
    return BwdPostprocessSpec(
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        block_q=tile.block_q,
        num_warps=tile.num_warps,
        warps_dq=tile.warps_dq,
        arch=spec.arch,
    )


def specs_of_parts(problem: Problem, arch: str) -> list[KernelSpec]:
    """Return the kernels that may add up parts of dK and dV, depending on lengths."""
    made: list[KernelSpec] = []
    for dim in dict.fromkeys((problem.head_dim, problem.head_dim_v)):
        if problem.kv_layout is not SeqLayout.PAGED:
            made.append(SumPartsSpec(dtype=problem.dtype, head_dim=dim, arch=arch))
        if problem.kv_layout is not SeqLayout.BATCHED:
            made.append(ScatterSpec(dtype=problem.dtype, head_dim=dim, arch=arch))
    return made


def specs_of_backward(
    problem: Problem, arch: str, *, deterministic: bool = False
) -> list[KernelSpec]:
    """Return the kernels that a backward pass may need, depending on lengths."""
    spec = bwd_spec(problem, arch, deterministic=deterministic)
    stats = bwd_preprocess_specs(problem.out_dtype, problem.head_dim_v, arch)
    specs: list[KernelSpec] = [spec, *stats, dq_spec(spec)]
    specs += BwdSm90Spec.of_calls(problem, None, arch, (), deterministic=spec.deterministic)
    split_fp32 = split_fp32_backward(backward_problem(problem))
    if split_fp32 is not None:
        other = bwd_spec(split_fp32, arch, deterministic=deterministic)
        specs += [split_fp32_spec(split_fp32, arch, gradients=True), other, dq_spec(other)]
    return list(dict.fromkeys([*specs, *specs_of_parts(spec.problem, arch)]))


def _in_16_bits(arch: str) -> Iterator[KernelSpec]:
    bf16 = Dtype.BF16
    for dim in (32, 64, 96, 128, 192, 256):
        yield bwd_spec(problem(bf16, dim), arch)
    for dim in (64, 128):
        yield bwd_spec(problem(bf16, dim, MaskKind.FULL), arch)
        yield bwd_spec(problem(bf16, dim), arch, deterministic=True)
        for features in BACKWARD_FEATURES:
            yield bwd_spec(problem(bf16, dim, **features), arch)
    yield bwd_spec(problem(bf16, 192, head_dim_v=128), arch)
    yield bwd_spec(problem(bf16, 100, access=Access.ELEMENT), arch)


def _in_fp32(arch: str) -> Iterator[KernelSpec]:
    """Yield fp32 problems with TF32 products, and with fp16 parts where supported."""
    fp32 = Dtype.FP32
    for dim in (64, 128, 256):
        yield bwd_spec(problem(fp32, dim), arch)
    for dim in (16, 64, 80, 128):
        yield bwd_spec(problem(fp32, dim, numerics=Numerics.F16X3), arch)
    for dim in (64, 128):
        causal = problem(fp32, dim, numerics=Numerics.F16X3)
        yield bwd_spec(replace(causal, mask=MaskKind.FULL), arch)
        yield bwd_spec(causal, arch, deterministic=True)
        for features in BACKWARD_FEATURES:
            asked = split_fp32_backward(problem(fp32, dim, **features))
            if asked is not None:
                yield bwd_spec(asked, arch)

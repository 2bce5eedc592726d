"""The score-gradient kernel: gradients of biases, relative biases and ALiBi slopes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

from jitattn.kernels.bwd import BackwardSpec
from jitattn.kernels.bwd_tiles import BwdTile, backward_problem, choose_square
from jitattn.kernels.fwd import listed_problem
from jitattn.kernels.matrix import problem
from jitattn.spec.enums import BiasKind, Dtype, MaskKind, MatrixSize, RowClass, ScoreTarget, Switch
from jitattn.spec.kernel_spec import KernelSpec, Problem
from jitattn.values.gears import resolve_numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreGradSpec(BackwardSpec):
    """Spec of the score-gradient kernel."""

    family: ClassVar[str] = "bwd_scores"
    options: ClassVar[Mapping[str, tuple[StrEnum, ...]]] = {"target": tuple(ScoreTarget)}
    problem: Problem  #: as `backward_problem` has it
    tile: BwdTile
    target: ScoreTarget
    arch: str

    @classmethod
    def of_calls(
        cls,
        problem: Problem,
        gear: int | None,
        arch: str,
        rows: Sequence[RowClass],
        **options: Any,  # noqa: ANN401 - of the type of each field
    ) -> Iterator[KernelSpec]:
        """Yield the score-gradient kernel for the target in `options`."""
        del gear, rows
        yield score_grad_spec(listed_problem(problem), arch, options["target"])

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        bf16, same = Dtype.BF16, BiasKind.SAME
        if size >= MatrixSize.TUNED:
            biased = problem(bf16, 128, bias=BiasKind.FP32, relative_bias=Switch.ON)
            for target in ScoreTarget:
                yield score_grad_spec(biased, arch, target)
            yield score_grad_spec(problem(bf16, 256, bias=same), arch, ScoreTarget.MATRIX)
            listed = problem(bf16, 64, MaskKind.BLOCK_LISTS, bias=same)
            yield score_grad_spec(listed, arch, ScoreTarget.MATRIX)
        yield score_grad_spec(problem(bf16, 64, bias=same), arch, ScoreTarget.ROW)


def score_grad_spec(problem: Problem, arch: str, target: ScoreTarget) -> ScoreGradSpec:
    """Return the spec of a score-gradient kernel."""
    problem = replace(backward_problem(problem), numerics=resolve_numerics(2, problem.dtype))
    tile = choose_square(problem, arch)
    # Two CTAs run side by side where this costs no spills.
    few_columns = problem.head_dim <= (128 if problem.mask is MaskKind.BLOCK_LISTS else 64)
    if target is ScoreTarget.MATRIX and few_columns and problem.dtype is not Dtype.FP32:
        tile = replace(tile, min_blocks_per_sm=2)
    return ScoreGradSpec(problem=problem, tile=tile, target=target, arch=arch)

"""The captured-gradient kernel: gradients of tensors that a traced function captures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from jitattn.errors import UnsupportedError
from jitattn.kernels.bwd import BackwardSpec
from jitattn.kernels.bwd_arguments import bwd_arguments, bwd_structs
from jitattn.kernels.bwd_tiles import BwdTile, backward_problem, choose_square, smem_bytes
from jitattn.kernels.fwd import listed_problem
from jitattn.kernels.fwd_arguments import function_struct
from jitattn.kernels.matrix import SLOPES_AND_TABLE, problem
from jitattn.kernels.tiles import max_smem_bytes
from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable
from jitattn.spec.derivative import differentiable_tensors
from jitattn.spec.enums import Dtype, MatrixSize, RowClass
from jitattn.spec.kernel_spec import KernelSpec, Problem
from jitattn.spec.program import parse
from jitattn.values.gears import resolve_numerics

#: Further parameters, beside those of the function: as many 4-byte fields as keep its struct's end.
CAPTURED: Final = (
    Argument("captured_sums", "int64_t*", "of all wanted tensors, dense; null: measures"),
    Argument("captured_most", "uint32_t*", "[tensors]: bits of the largest |c| of each"),
    Argument("captured_wanted", "int32_t", "bit by bit, which tensors have sums"),
    Argument("captured_bits", "int32_t", "k"),
)
#: Scores that the function is given, in shared memory of fixed size.
_BYTES_A_PAIR: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedGradSpec(BackwardSpec):
    """Spec of the captured-gradient kernel."""

    family: ClassVar[str] = "bwd_captured"
    derives_captured: ClassVar[bool] = True
    problem: Problem  #: as `backward_problem` has it, with a function
    tile: BwdTile
    arch: str

    @property
    def arguments(self) -> ArgumentTable:
        """Return the parameter struct of this kernel."""
        return _table(bwd_arguments(self.problem), self.problem.function)

    @property
    def structs(self) -> tuple[ArgumentStruct, ...]:
        """Return the structs of the generated header."""
        return _with_sums(bwd_structs(self.problem), self.problem.function)

    @classmethod
    def tables(cls) -> tuple[ArgumentTable, ...]:
        """Return the parameter struct of the compile matrix's function: each has its own."""
        spec = captured_grad_spec(problem(Dtype.BF16, 64, function=SLOPES_AND_TABLE), "sm_80")
        return (spec.arguments,)

    @classmethod
    def of_calls(
        cls,
        problem: Problem,
        gear: int | None,
        arch: str,
        rows: Sequence[RowClass],
        **options: Any,  # noqa: ANN401 - there are none
    ) -> Iterator[KernelSpec]:
        """Yield the captured-gradient kernel."""
        del gear, rows, options
        yield captured_grad_spec(listed_problem(problem), arch)

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        dims = (64, 128, 256) if size >= MatrixSize.TUNED else (64,)
        for dim in dims:
            yield captured_grad_spec(problem(Dtype.BF16, dim, function=SLOPES_AND_TABLE), arch)


@functools.lru_cache(1024)
def _table(table: ArgumentTable, function: str) -> ArgumentTable:
    return ArgumentTable(*_with_sums(table.structs, function))


def _with_sums(structs: tuple[ArgumentStruct, ...], function: str) -> tuple[ArgumentStruct, ...]:
    plain, own = function_struct(function), function_struct(function, *CAPTURED)
    return tuple(own if one is plain else one for one in structs)


def captured_grad_spec(problem: Problem, arch: str) -> CapturedGradSpec:
    """Return the spec of a captured-gradient kernel.

    Raises
    ------
    UnsupportedError
        The problem has no function whose score depends on a captured tensor.
    """
    if not problem.function or not differentiable_tensors(parse(problem.function)):
        raise UnsupportedError(
            f"family bwd_captured with function={problem.function!r}: it needs a program whose "
            "score reads a floating tensor"
        )
    problem = replace(backward_problem(problem), numerics=resolve_numerics(2, problem.dtype))
    tile = choose_square(problem, arch, _BYTES_A_PAIR)
    # No copies are started ahead: another CTA runs meanwhile, if it fits.
    room = smem_bytes(problem, tile) + _BYTES_A_PAIR * tile.block_q * tile.block_kv
    if 2 * room <= max_smem_bytes(arch):
        tile = replace(tile, min_blocks_per_sm=2)
    return CapturedGradSpec(problem=problem, tile=tile, arch=arch)

"""Base of the kernel families with a `Problem` and a tile chosen for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from typing import Any, ClassVar

from jitattn.spec.enums import Access, Dtype, MaskKind, RowClass
from jitattn.spec.kernel_spec import KernelSpec, Problem
from jitattn.values.gears import resolve_numerics


class ProblemSpec(KernelSpec):
    """A spec with fields `problem` and `tile`, and options of its family."""

    __slots__ = ()
    #: Fields beside problem and tile, with the values that a choice without them implies.
    options: ClassVar[Mapping[str, tuple[StrEnum, ...]]] = {}
    problem: Problem

    @classmethod
    def of_calls(
        cls,
        problem: Problem,
        gear: int | None,
        arch: str,
        rows: Sequence[RowClass],
        **options: Any,  # noqa: ANN401 - of the type of each field
    ) -> Iterator[KernelSpec]:
        """Yield the kernels that calls with this problem may need, depending on lengths.

        Parameters
        ----------
        problem : Problem
        gear : int or None
            None: only the numerics of `problem`.
        arch : str
        rows : sequence of RowClass
            Those that are asked for.
        options : StrEnum
            One value for each field of `cls.options`.
        """
        raise NotImplementedError

    def to_choice(self) -> dict[str, str | int]:
        """Return the choice for exactly this kernel; the tile follows from it."""
        flat = self.to_dict()
        names = ("family", "arch", *(field.name for field in fields(Problem)), *self.options)
        return {name: flat[name] for name in names if name in flat}

    def command(self) -> str:
        """Return the shell command that builds this kernel and the others its calls may need."""
        problem = self.problem
        dims = f"{problem.head_dim}"
        if problem.head_dim_v != problem.head_dim:
            dims += f":{problem.head_dim_v}"
        words = [self._prebuild(), f"--dtype {problem.dtype}", f"--head-dim {dims}"]
        words.append(f"--mask {problem.mask}")
        usual = usual_problem(problem.dtype, problem.head_dim, problem.head_dim_v, problem.mask)
        for field in fields(Problem):
            value = getattr(problem, field.name)
            if value != getattr(usual, field.name):
                words.append(f"--set {field.name}={value}")
        if self.options:
            words.append(f"--set family={self.family}")
            words += [f"--set {name}={getattr(self, name)}" for name in self.options]
        return " ".join(words)


def usual_problem(
    dtype: Dtype,
    head_dim: int,
    head_dim_v: int,
    mask: MaskKind,
    gear: int | None = None,
    **given: Any,  # noqa: ANN401 - of the type of each field
) -> Problem:
    """Build the problem of a typical call with these properties; `given` sets further fields."""
    aligned = (head_dim * dtype.bytes) % 16 == 0 == (head_dim_v * dtype.bytes) % 16
    usual: dict[str, Any] = {
        "dtype": dtype,
        "out_dtype": dtype,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "mask": mask,
        "access": Access.VEC16 if aligned else Access.ELEMENT,
    }
    if "numerics" not in given:
        usual["numerics"] = resolve_numerics(gear, dtype)
    return Problem(**{**usual, **given})

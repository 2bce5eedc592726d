"""Expands choices, human-written descriptions of kernels by their use, into kernel specs.

A choice is a table of fields, each with one value or a list of them, and stands for every
combination::

    [[kernels]]
    dtype = ["fp16", "bf16"]
    head_dim = [64, "192:128"]     # "D:Dv" where v's head dim differs
    mask = "causal"
    arch = ["sm_80", "sm_90"]      # else those that the command line names

The fields are those of `Problem`, so this grows with it; `gear` may stand for `numerics`, for all
that its calls can need; `rows` restricts a choice to one row class. ``family = ["fwd", "bwd"]``
makes what training needs, `bwd_scores` what gradients of biases, relative biases and ALiBi slopes
need, `bwd_captured` what those of tensors that a function captures
need. Tiles are never named: the installed version chooses them. Files of choices are read by
`plan/spec_files.py`. Presets are choices for well-known model families.
"""

from __future__ import annotations

import itertools
import logging
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final, get_type_hints

from jitattn.errors import InvalidInputError, JitAttnError
from jitattn.kernels.fwd import FwdSpec
from jitattn.kernels.operands import numerics_fault
from jitattn.kernels.problem_spec import ProblemSpec, usual_problem
from jitattn.plan import spec_files
from jitattn.plan.choice_fields import DEFAULTS, Choice, Fields
from jitattn.spec.enums import Dtype, MaskKind, RowClass
from jitattn.spec.kernel_spec import ARCH, KernelSpec, Problem, arch_number, families
from jitattn.spec.program import parse
from jitattn.values.gears import DEFAULT_GEAR, resolve_numerics

_LOG: Final = logging.getLogger("jitattn")
_PRESETS: Final = Path(__file__).resolve().parents[1] / "presets.toml"
_DIMENSIONS: Final = ("dtype", "head_dim", "head_dim_v", "mask")


def problem_fields() -> dict[str, list[str] | None]:
    """Fields of `Problem` with the values that each may have; None for a head dim."""
    hints = get_type_hints(Problem)
    return {
        field.name: [member.value for member in hints[field.name]]
        if issubclass(hints[field.name], StrEnum)
        else None
        for field in fields(Problem)
    }


def specs_of(
    choices: Sequence[Choice], archs: Sequence[str] = (), where: str = ""
) -> list[KernelSpec]:
    """Return the specs of all kernels that the choices stand for, each once.

    A choice without `rows` stands for all that calls with its properties can need: every row class.

    Parameters
    ----------
    choices : sequence of mapping
    archs : sequence of str
        Architectures for choices that name none: "sm_80", "80" or 80.
    where : str
        Where the choices come from, for errors.

    Raises
    ------
    InvalidInputError
        A field is unknown, or a value is none of those it may have.
    UnsupportedError
        An architecture is older than sm_80, or a gear does not exist for a dtype.
    """
    where = where or "choice"
    places = (
        [where] if len(choices) == 1 else [f"{where}, kernel {n + 1}" for n in range(len(choices))]
    )
    specs, errors = expand(zip(places, choices, strict=True), archs)
    for error in errors:
        raise error
    return specs


def expand(
    entries: Iterable[tuple[str, Choice]], archs: Sequence[str] = ()
) -> tuple[list[KernelSpec], list[JitAttnError]]:
    """Expand choices into kernel specs, and return an error for each invalid choice.

    Parameters
    ----------
    entries : iterable of (str, mapping)
        Choices, each with its place, as `spec_files.read` returns them; errors begin with it.
    archs : sequence of str
        As in `specs_of`.
    """
    specs: dict[KernelSpec, None] = {}
    errors: list[JitAttnError] = []
    for place, choice in entries:
        try:
            specs.update(dict.fromkeys(_expand(choice, archs, place)))
        except JitAttnError as error:
            text = str(error)
            errors.append(type(error)(text if text.startswith(place) else f"{place}: {text}"))
    return list(specs), errors


def read_entries(path: Path) -> list[tuple[str, Choice]]:
    """Read the choices of a spec file, each with its place; warn of entries that are no choices.

    Raises
    ------
    InvalidInputError
        It cannot be read, is no spec file, or holds no choice at all.
    """
    found = spec_files.read(path)
    for fault in found.faults:
        _LOG.warning(fault)
    return found.entries


def read_file(path: Path) -> list[Choice]:
    """Read the choices of a spec file, as `read_entries` does, without their places."""
    return [choice for _, choice in read_entries(path)]


@cache
def presets() -> dict[str, tuple[str, list[Choice]]]:
    """Return every preset by name, with its description and choices."""
    raw = tomllib.loads(_PRESETS.read_text(encoding="utf-8"))
    return {name: (preset["about"], preset["kernels"]) for name, preset in raw.items()}


def preset(names: Sequence[str]) -> list[Choice]:
    """Return the choices of presets by name; "all" means every one.

    Raises
    ------
    InvalidInputError
        A name is unknown.
    """
    known = presets()
    chosen: list[Choice] = []
    for name in names:
        if name != "all" and name not in known:
            raise InvalidInputError(f"preset {name!r}: it must be all or one of {', '.join(known)}")
        for one in known if name == "all" else (name,):
            chosen += known[one][1]
    return chosen


def arch_name(value: object) -> str:
    """Return "sm_80" for "sm_80", "80" or 80.

    Raises
    ------
    InvalidInputError
        It is no architecture.
    """
    name = f"sm_{str(value).strip().removeprefix('sm_')}"
    if isinstance(value, bool) or not ARCH.fullmatch(name):
        raise InvalidInputError(
            f"arch {value!r}: it must be the number of an architecture, as in 80, 86, 89, 90"
        )
    return name


def _expand(choice: Choice, archs: Sequence[str], where: str) -> list[KernelSpec]:
    given = Fields(choice, where)
    known = families()
    kinds = [known[name] for name in given.words("family", known) or [FwdSpec.family]]
    plain = [kind for kind in kinds if not issubclass(kind, ProblemSpec)]
    _check(given, plain)
    named = [arch_name(value) for value in given.values("arch") or archs]
    if not named:
        given.refuse("no architecture is named; add arch, or pass --arch")
    for arch in named:
        if arch_number(arch) < 80:
            given.refuse(f"{arch} is older than sm_80, which jitattn needs")
    specs: dict[KernelSpec, None] = {}
    for kind in plain:
        specs.update(dict.fromkeys(_plain_specs(kind, given, named)))
    tiled = [kind for kind in _problem_kinds() if kind in kinds]
    if not tiled:
        return list(specs)
    rows = given.row_classes() or [*RowClass]
    for (problem, gear), arch in itertools.product(_problems(given), named):
        for kind in tiled:
            for options in _options(kind, given):
                specs.update(dict.fromkeys(kind.of_calls(problem, gear, arch, rows, **options)))
    if not specs:
        given.refuse(f"no such call takes a {' or '.join(kind.family for kind in tiled)} kernel")
    return list(specs)


def _problem_kinds() -> list[type[ProblemSpec]]:
    return [kind for kind in families().values() if issubclass(kind, ProblemSpec)]


def _other_fields() -> tuple[str, ...]:
    """Return the fields of a choice that `Problem` lacks."""
    options = (name for kind in _problem_kinds() for name in kind.options)
    return ("family", "arch", "gear", "rows", *options)


def _options(kind: type[ProblemSpec], given: Fields) -> Iterator[dict[str, Any]]:
    """Yield every combination of the options of a family, typed."""
    hints = get_type_hints(kind)
    values = [
        [hints[name](word) for word in given.values(name)] or usual
        for name, usual in kind.options.items()
    ]
    for chosen in itertools.product(*values):
        yield dict(zip(kind.options, chosen, strict=True))


def _check(given: Fields, plain: Sequence[type[KernelSpec]]) -> None:
    """Refuse unknown fields and invalid values, including those that no chosen family uses."""
    allowed = problem_fields()
    own = (field.name for kind in plain for field in fields(kind))  # type: ignore[arg-type]
    others = _other_fields()
    given.check_names({*others, *allowed, *own}, (*others, *allowed))
    for name in given.choice:
        words = allowed.get(name)
        if words is not None:
            given.words(name, words)
    for kind in _problem_kinds():
        hints = get_type_hints(kind)
        for name in kind.options:
            given.words(name, [*hints[name]])
    given.row_classes()
    for text in given.values("function"):
        try:
            if text != "":  # none
                parse(str(text))
        except ValueError as error:
            given.refuse(f"function: {error}")
    for gear in given.values("gear"):
        resolve_numerics(gear, Dtype.FP16)


def _plain_specs(
    kind: type[KernelSpec], given: Fields, archs: Sequence[str]
) -> Iterator[KernelSpec]:
    """Yield every kernel of a family without tiles; unnamed dtypes are the inputs' dtype."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name != "arch"]  # type: ignore[arg-type]
    options: list[list[Any]] = []
    for name in names:
        is_named = name in given.choice or name in DEFAULTS
        if hints[name] is int:
            own = "head_dim" if name == "head_dim_v" and not is_named else name
            options.append(given.numbers(own))
            if not options[-1]:
                given.refuse(f"{name} is missing, which {kind.family} kernels have")
        elif hints[name] is str:
            options.append([str(value) for value in given.values(name)])
            if not options[-1]:
                given.refuse(f"{name} is missing, which {kind.family} kernels have")
        elif is_named:
            options.append([hints[name](word) for word in given.words(name, [*hints[name]])])
        else:
            options.append([None] if hints[name] is Dtype else [*hints[name]])
    for arch, *chosen in itertools.product(archs, *options):
        values = dict(zip(names, chosen, strict=True))
        filled = {name: values["dtype"] if one is None else one for name, one in values.items()}
        spec = kind(arch=arch, **filled)  # type: ignore[call-arg]
        reason = spec.fault()
        if reason is not None:
            given.refuse(reason)
        yield spec


def _problems(given: Fields) -> list[tuple[Problem, int | None]]:
    """Yield every problem of a choice, with its gear, or None if numerics are named instead."""
    dims = given.head_dims()
    dtypes = [Dtype(word) for word in given.values("dtype")]
    skipped = {*_DIMENSIONS, *_other_fields()} - {"gear"}
    others = [name for name in given.choice if name not in skipped]
    values = [given.values(name) for name in others]
    found: list[tuple[Problem, int | None]] = []
    for dtype, (dim, dim_v), mask in itertools.product(dtypes, dims, given.values("mask")):
        for chosen in itertools.product(*values):
            named = dict(zip(others, chosen, strict=True))
            gear = None if "numerics" in named else named.get("gear", DEFAULT_GEAR[dtype])
            problem = _problem(named, dtype, dim, dim_v, mask)
            reason = numerics_fault(problem)
            if reason is not None:
                given.refuse(reason)
            found.append((problem, gear))
    return found


def _problem(
    chosen: Mapping[str, Any], dtype: Dtype, head_dim: int, head_dim_v: int, mask: str
) -> Problem:
    """Build a problem; fields that the choice leaves open get the values of a typical call."""
    hints = get_type_hints(Problem)
    given = {name: hints[name](value) for name, value in chosen.items() if name != "gear"}
    gear = chosen.get("gear")
    return usual_problem(dtype, head_dim, head_dim_v, MaskKind(mask), gear, **given)

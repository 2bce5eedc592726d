"""Choices: kernels described by what they are for, in files that people read and write.

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
need. Tiles are never named: the installed version chooses them. Files of choices are read by
`plan/spec_files.py`. Presets are choices for well-known model families.
"""

from __future__ import annotations

import itertools
import logging
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final, get_type_hints

from jitattn.errors import InvalidInputError, JitAttnError
from jitattn.kernels.bwd_tiles import score_grad_spec, specs_of_backward
from jitattn.kernels.prepare_specs import numerics_fault, specs_for_gear
from jitattn.kernels.tiles import fwd_spec
from jitattn.plan import spec_files
from jitattn.plan.choice_fields import DEFAULTS, Choice, Fields
from jitattn.spec.enums import Access, Dtype, MaskKind, RowClass, ScoreTarget, Switch
from jitattn.spec.kernel_spec import (
    ARCH,
    FAMILIES,
    PLAIN_FAMILIES,
    BwdSpec,
    FwdSpec,
    KernelSpec,
    PlainSpec,
    Problem,
    ScoreGradSpec,
    arch_number,
    impossible,
)
from jitattn.values.gears import DEFAULT_GEAR, FAST_HALVES_ARCHS, resolve_numerics

_LOG: Final = logging.getLogger("jitattn")
_PRESETS: Final = Path(__file__).resolve().parents[1] / "presets.toml"
#: Fields of a choice that are no fields of `Problem`.
_OTHER_FIELDS: Final = ("family", "arch", "gear", "rows", "deterministic", "target")
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
    """Return every kernel that the choices stand for, without repetition.

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
    """Return every kernel that choices stand for, and an error for each choice that is wrong.

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


def to_choice(spec: KernelSpec) -> dict[str, str | int]:
    """Return the choice that stands for exactly one kernel."""
    flat = spec.to_dict()
    problem = {field.name: flat[field.name] for field in fields(Problem) if field.name in flat}
    if isinstance(spec, BwdSpec):
        extra = {"deterministic": flat["deterministic"]}
        return {"family": spec.family, "arch": spec.arch, **problem, **extra}
    if isinstance(spec, ScoreGradSpec):
        return {"family": spec.family, "arch": spec.arch, **problem, "target": flat["target"]}
    if not isinstance(spec, FwdSpec):
        return flat
    rows = next(
        (row for row in RowClass if fwd_spec(spec.problem, spec.arch, row) == spec), RowClass.MANY
    )
    return {"family": spec.family, "arch": spec.arch, **problem, "rows": rows.name.lower()}


def command(spec: KernelSpec) -> str:
    """Return the shell command that makes a kernel, with the others that its calls can need."""
    base = f"jitattn-cache prebuild --arch {spec.arch.removeprefix('sm_')}"
    if not isinstance(spec, FwdSpec | BwdSpec | ScoreGradSpec):
        others = [field.name for field in fields(spec) if field.name not in ("arch", "dtype")]
        words = [base, f"--dtype {spec.dtype}", f"--set family={spec.family}"]
        return " ".join([*words, *(f"--set {name}={getattr(spec, name)}" for name in others)])
    problem = spec.problem
    dims = f"{problem.head_dim}"
    if problem.head_dim_v != problem.head_dim:
        dims += f":{problem.head_dim_v}"
    words = [base, f"--dtype {problem.dtype}", f"--head-dim {dims}", f"--mask {problem.mask}"]
    usual = _problem({}, problem.dtype, problem.head_dim, problem.head_dim_v, problem.mask)
    for field in fields(Problem):
        value = getattr(problem, field.name)
        if value != getattr(usual, field.name):
            words.append(f"--set {field.name}={value}")
    if isinstance(spec, BwdSpec):
        words.append(f"--set family=bwd --set deterministic={spec.deterministic}")
    if isinstance(spec, ScoreGradSpec):
        words.append(f"--set family=bwd_scores --set target={spec.target}")
    return " ".join(words)


def read_entries(path: Path) -> list[tuple[str, Choice]]:
    """Read the choices of a spec file, each with its place; what is no choice costs a warning.

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
    """Every preset by name: what it is for, and its choices."""
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
    families = given.words("family", FAMILIES) or [FwdSpec.family]
    plain = [PLAIN_FAMILIES[family] for family in families if family in PLAIN_FAMILIES]
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
    if set(families) <= set(PLAIN_FAMILIES):
        return list(specs)
    rows = given.row_classes() or [*RowClass]
    deterministic = [Switch(word) for word in given.values("deterministic")] or [Switch.OFF]
    targets = [ScoreTarget(word) for word in given.values("target")] or [*ScoreTarget]
    for (problem, gear), arch in itertools.product(_problems(given), named):
        listed = problem
        if problem.mask is MaskKind.FINE_STRIDE:  # a pattern that other kernels have lists of
            listed = replace(problem, mask=MaskKind.BLOCK_LISTS)
        if FwdSpec.family in families:
            specs.update(dict.fromkeys(_forward_specs(listed, gear, arch, rows)))
        if BwdSpec.family in families:
            for switch in deterministic:
                made = specs_of_backward(problem, arch, deterministic=switch is Switch.ON)
                specs.update(dict.fromkeys(made))
        if ScoreGradSpec.family in families:
            for target in targets:
                specs[score_grad_spec(listed, arch, target)] = None
    return list(specs)


def _check(given: Fields, plain: Sequence[type[PlainSpec]]) -> None:
    """Refuse unknown fields, and values that a field cannot have, whatever the families need."""
    allowed = problem_fields()
    own = (field.name for kind in plain for field in fields(kind))
    given.check_names({*_OTHER_FIELDS, *allowed, *own}, (*_OTHER_FIELDS, *allowed))
    for name in given.choice:
        words = allowed.get(name)
        if words is not None:
            given.words(name, words)
    given.words("deterministic", [*Switch])
    given.words("target", [*ScoreTarget])
    given.row_classes()
    for gear in given.values("gear"):
        resolve_numerics(gear, Dtype.FP16)


def _forward_specs(
    problem: Problem, gear: int | None, arch: str, rows: Sequence[RowClass]
) -> Iterator[KernelSpec]:
    """Every kernel that calls of a gear can need; the GPU and the lengths decide which they do.

    Without a gear, those with the numerics of `problem`.
    """
    numerics = {problem.numerics}
    if gear is not None and arch in FAST_HALVES_ARCHS:
        numerics.add(resolve_numerics(gear, problem.dtype, has_fast_halves=True))
    for one, row in itertools.product(sorted(numerics), rows):
        yield fwd_spec(replace(problem, numerics=one), arch, row)
    if gear is not None and RowClass.MANY in rows:
        yield from specs_for_gear(problem, gear, arch)


def _plain_specs(
    kind: type[PlainSpec], given: Fields, archs: Sequence[str]
) -> Iterator[KernelSpec]:
    """Every kernel of a family without tiles; dtypes that are not named are that of the inputs."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name != "arch"]
    options: list[list[Any]] = []
    for name in names:
        is_named = name in given.choice or name in DEFAULTS
        if hints[name] is int:
            own = "head_dim" if name == "head_dim_v" and not is_named else name
            options.append(given.numbers(own))
            if not options[-1]:
                given.refuse(f"{name} is missing, which {kind.family} kernels have")
        elif is_named:
            options.append([hints[name](word) for word in given.words(name, [*hints[name]])])
        else:
            options.append([None] if hints[name] is Dtype else [*hints[name]])
    for arch, *chosen in itertools.product(archs, *options):
        values = dict(zip(names, chosen, strict=True))
        filled = {name: values["dtype"] if one is None else one for name, one in values.items()}
        spec = kind(arch=arch, **filled)
        reason = impossible(spec)
        if reason is not None:
            given.refuse(reason)
        yield spec


def _problems(given: Fields) -> list[tuple[Problem, int | None]]:
    """Every problem of a choice, with its gear; with None if numerics are named instead."""
    dims = given.head_dims()
    dtypes = [Dtype(word) for word in given.values("dtype")]
    skipped = {*_DIMENSIONS, *_OTHER_FIELDS} - {"gear"}
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
    """Fill in what a choice leaves open as the usual call would have it."""
    hints = get_type_hints(Problem)
    given = {name: hints[name](value) for name, value in chosen.items() if name != "gear"}
    aligned = (head_dim * dtype.bytes) % 16 == 0 == (head_dim_v * dtype.bytes) % 16
    usual: dict[str, Any] = {
        "dtype": dtype,
        "out_dtype": dtype,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "mask": hints["mask"](mask),
        "access": Access.VEC16 if aligned else Access.ELEMENT,
    }
    if "numerics" not in given:
        usual["numerics"] = resolve_numerics(chosen.get("gear"), dtype)
    for field in fields(Problem):
        if field.name not in usual and field.name not in given and field.default is MISSING:
            raise InvalidInputError(f"the field {field.name} is missing")
    return Problem(**{**usual, **given})

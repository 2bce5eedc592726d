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
need. Tiles are never named: the installed version chooses them. A spec file is TOML or JSON with a
list ``kernels``, or lines of JSON with one choice each, as ``JITATTN_RECORD`` writes them. Presets
are choices for well-known model families.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar, get_type_hints

from jitattn.bwd_tiles import score_grad_spec, specs_of_backward
from jitattn.errors import InvalidInputError, JitAttnError
from jitattn.gears import DEFAULT_GEAR, FAST_HALVES_ARCHS, resolve_numerics
from jitattn.jit.enums import Access, Dtype, MaskKind, RowClass, ScoreTarget, Switch
from jitattn.jit.spec import (
    FAMILIES,
    PLAIN_FAMILIES,
    BwdSpec,
    FwdSpec,
    KernelSpec,
    PlainSpec,
    Problem,
    ScoreGradSpec,
    arch_number,
)
from jitattn.prepared_specs import specs_for_gear
from jitattn.tiles import fwd_spec

_Word = TypeVar("_Word", bound=StrEnum)
#: One table of a spec file.
Choice: TypeAlias = Mapping[str, Any]
MAX_HEAD_DIM: Final = 256
_MAX_FILE_BYTES: Final = 16 * 1024 * 1024
_PRESETS: Final = Path(__file__).resolve().parents[1] / "presets.toml"
#: Fields of a choice that are no fields of `Problem`.
_OTHER_FIELDS: Final = ("family", "arch", "gear", "rows", "deterministic", "target")
_DIMENSIONS: Final = ("dtype", "head_dim", "head_dim_v", "mask")
_DEFAULTS: Final[dict[str, tuple[str | int, ...]]] = {
    "dtype": ("fp16", "bf16"),
    "head_dim": (64, 128),
    "mask": ("full", "causal"),
    "groups": (1,),
}


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
    specs: dict[KernelSpec, None] = {}
    for number, choice in enumerate(choices, 1):
        place = f"{where or 'choice'}, kernel {number}" if len(choices) > 1 else where or "choice"
        try:
            for spec in _expand(choice, archs, place):
                specs[spec] = None
        except JitAttnError as error:
            if str(error).startswith(place):
                raise
            raise type(error)(f"{place}: {error}") from error
    return list(specs)


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


def read_file(path: Path) -> list[Choice]:
    """Read a spec file: TOML, JSON, or a record of JSON lines.

    Raises
    ------
    InvalidInputError
        It cannot be read, or is none of these.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"spec file {path}: it cannot be read ({error})") from error
    if len(text) > _MAX_FILE_BYTES:
        raise InvalidInputError(f"spec file {path}: it is larger than {_MAX_FILE_BYTES} bytes")
    try:
        raw = tomllib.loads(text) if path.suffix == ".toml" else _parse_json(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"spec file {path}: {error}") from error
    kernels = raw
    if isinstance(raw, dict):
        is_one_choice = path.suffix != ".toml" and "kernels" not in raw  # a record of one line
        kernels = [raw] if is_one_choice else raw.get("kernels")
    if not isinstance(kernels, list) or not all(isinstance(one, dict) for one in kernels):
        raise InvalidInputError(
            f"spec file {path}: it must hold a list 'kernels' of tables, or one JSON object a line"
        )
    return kernels


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
    text = str(value).strip().removeprefix("sm_")
    digits = text[:-1] if text[-1:] in ("a", "f") else text
    if isinstance(value, bool) or not digits.isdecimal() or not 10 <= int(digits) <= 999:
        raise InvalidInputError(
            f"arch {value!r}: it must be the number of an architecture, as in 80, 86, 89, 90"
        )
    return f"sm_{text}"


def _parse_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise
        return [json.loads(line) for line in lines]


def _expand(choice: Choice, archs: Sequence[str], where: str) -> list[KernelSpec]:
    families = _values(choice, "family") or [FwdSpec.family]
    for family in families:
        if family not in FAMILIES:
            raise InvalidInputError(
                f"{where}: family={family!r}: it must be one of {', '.join(FAMILIES)}"
            )
    allowed = problem_fields()
    plain = [PLAIN_FAMILIES[family] for family in families if family in PLAIN_FAMILIES]
    known = {*_OTHER_FIELDS, *allowed, *(field.name for kind in plain for field in fields(kind))}
    for name in choice:
        if name not in known:
            raise InvalidInputError(
                f"{where}: unknown field {name!r}; the fields are "
                f"{', '.join((*_OTHER_FIELDS, *allowed))}"
            )
    named = [arch_name(value) for value in _values(choice, "arch")] or [
        arch_name(value) for value in archs
    ]
    if not named:
        raise InvalidInputError(f"{where}: no architecture is named; add arch, or pass --arch")
    for arch in named:
        if arch_number(arch) < 80:
            raise InvalidInputError(f"{where}: {arch} is older than sm_80, which jitattn needs")
    specs: dict[KernelSpec, None] = {}
    for kind in plain:
        specs.update(dict.fromkeys(_plain_specs(kind, choice, named, where)))
    if set(families) <= set(PLAIN_FAMILIES):
        return list(specs)
    rows = [_row_class(value, where) for value in _values(choice, "rows")]
    deterministic = _members(choice, "deterministic", Switch, where) or [Switch.OFF]
    targets = _members(choice, "target", ScoreTarget, where) or list(ScoreTarget)
    for (problem, gear), arch in itertools.product(_problems(choice, allowed, where), named):
        listed = problem
        if problem.mask is MaskKind.FINE_STRIDE:  # a pattern that other kernels have lists of
            listed = replace(problem, mask=MaskKind.BLOCK_LISTS)
        if FwdSpec.family in families:
            specs.update(dict.fromkeys(_forward_specs(listed, gear, arch, rows or [*RowClass])))
        if BwdSpec.family in families:
            for switch in deterministic:
                made = specs_of_backward(problem, arch, deterministic=switch is Switch.ON)
                specs.update(dict.fromkeys(made))
        if ScoreGradSpec.family in families:
            for target in targets:
                specs[score_grad_spec(listed, arch, target)] = None
    return list(specs)


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


def _members(choice: Choice, name: str, kind: type[_Word], where: str) -> list[_Word]:
    values = _values(choice, name)
    for value in values:
        if value not in list(kind):
            raise InvalidInputError(
                f"{where}: {name}={value!r}: it must be one of {', '.join(kind)}"
            )
    return [kind(value) for value in values]


def _plain_specs(
    kind: type[PlainSpec], choice: Choice, archs: list[str], where: str
) -> Iterator[KernelSpec]:
    """Every kernel of a family without tiles; dtypes that are not named are that of the inputs."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name != "arch"]
    options: list[list[Any]] = []
    for name in names:
        own = "head_dim" if name == "head_dim_v" and name not in choice else name
        values = _values(choice, own)
        if hints[name] is int:
            options.append([_head_dim(value, where) for value in values])
            continue
        words = list(hints[name])
        if name not in choice and name not in _DEFAULTS:
            options.append([None] if hints[name] is Dtype else words)
            continue
        for value in values:
            if value not in words:
                raise InvalidInputError(
                    f"{where}: {name}={value!r}: it must be one of {', '.join(words)}"
                )
        options.append([hints[name](value) for value in values])
    for arch, *chosen in itertools.product(archs, *options):
        given = dict(zip(names, chosen, strict=True))
        dtype = given["dtype"]
        yield kind(arch=arch, **{name: value or dtype for name, value in given.items()})


def _problems(
    choice: Choice, allowed: dict[str, list[str] | None], where: str
) -> list[tuple[Problem, int | None]]:
    """Every problem of a choice, with its gear; with None if numerics are named instead."""
    dims = [
        _head_dims(value, choice.get("head_dim_v"), where) for value in _values(choice, "head_dim")
    ]
    dtypes = [Dtype(word) for word in _words(choice, "dtype", allowed, where)]
    masks = _words(choice, "mask", allowed, where)
    others = [
        name
        for name in choice
        if name not in _DIMENSIONS and (name == "gear" or name not in _OTHER_FIELDS)
    ]
    values = [
        _values(choice, name) if name == "gear" else _words(choice, name, allowed, where)
        for name in others
    ]
    found: list[tuple[Problem, int | None]] = []
    for dtype, (dim, dim_v), mask in itertools.product(dtypes, dims, masks):
        for chosen in itertools.product(*values):
            given = dict(zip(others, chosen, strict=True))
            gear = None if "numerics" in given else given.get("gear", DEFAULT_GEAR[dtype])
            found.append((_problem(given, dtype, dim, dim_v, mask), gear))
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


def _values(choice: Choice, name: str) -> list[Any]:
    value = choice.get(name, _DEFAULTS.get(name, ()))
    return list(value) if isinstance(value, list | tuple) else [value]


def _words(
    choice: Choice, name: str, allowed: dict[str, list[str] | None], where: str
) -> list[str]:
    values = _values(choice, name)
    words = allowed[name]
    for value in values:
        if words is not None and value not in words:
            raise InvalidInputError(
                f"{where}: {name}={value!r}: it must be one of {', '.join(words)}"
            )
    if not values:
        raise InvalidInputError(f"{where}: {name} is missing or empty")
    return values


def _head_dims(value: object, dim_v: object, where: str) -> tuple[int, int]:
    first, colon, second = str(value).partition(":")
    if colon and dim_v is not None:
        raise InvalidInputError(f"{where}: head_dim={value!r} and head_dim_v={dim_v!r}: give one")
    other = second if colon else first if dim_v is None else dim_v
    return _head_dim(first, where), _head_dim(other, where)


def _head_dim(value: object, where: str) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or not 1 <= int(text) <= MAX_HEAD_DIM:
        raise InvalidInputError(
            f"{where}: head dim {value!r}: it must be from 1 to {MAX_HEAD_DIM}, as in 64, or "
            "192:128 where v's differs"
        )
    return int(text)


def _row_class(value: object, where: str) -> RowClass:
    names = {row.name.lower(): row for row in RowClass}
    if value not in names:
        raise InvalidInputError(f"{where}: rows={value!r}: it must be one of {', '.join(names)}")
    return names[str(value)]

"""Tests that every public name of the systems with doors exists, has its signature, and is tested.

The names of the seeds are in public_names.toml. Those of the published packages are read out of the
archives by tools/public_names.py; what is left out of them has its reason.

``pytest tests/cpu/package/test_public_names.py --names-table FILE`` writes the table of names and
tests.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import tarfile
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools"))

from public_names import (  # noqa: E402
    archives_of,
    bare,
    door_of,
    published,
    reason_for,
    reasons,
)

NAMES: dict[str, dict[str, str]] = tomllib.loads(
    (ROOT / "tests" / "data" / "public_names.toml").read_text()
)
ALL = [(door, name) for door, names in NAMES.items() for name in names]
PUBLISHED = [
    (door, module, text)
    for door, package in published().items()
    for module, texts in package["modules"].items()
    for text in texts
]
IN_SCOPE = [one for one in PUBLISHED if reason_for(one[0], one[1], bare(one[2])) is None]


def found(door: str, name: str) -> Any:
    """What a name stands for."""
    module, parts = importlib.import_module(door_of(door)), name.split(".")
    while len(parts) > 1:
        try:
            module = importlib.import_module(f"{module.__name__}.{parts[0]}")
        except (ModuleNotFoundError, AttributeError):
            break
        parts.pop(0)
    value: Any = module
    for part in parts:
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(("door", "name"), ALL)
def test_a_name_takes_what_it_took(door: str, name: str) -> None:
    value, parameters = found(door, name), NAMES[door][name]
    if parameters == "=":
        assert not callable(value)
        return
    ours = inspect.signature(value).parameters.values()
    wanted = parameters.split()
    # Ours may take more, by keyword; and drop what the original drops.
    own = [one.name for one in ours if one.name in wanted or one.kind is not one.KEYWORD_ONLY]
    assert own[: len(wanted)] == wanted


@pytest.mark.parametrize(("door", "module", "text"), IN_SCOPE)
def test_a_published_name_is_there(door: str, module: str, text: str) -> None:
    """And takes what it took, by name; what took no names, takes as many."""
    place = importlib.import_module(".".join(filter(None, (door_of(door), module))))
    value = getattr(place, bare(text))
    if text.endswith(".apply"):
        assert callable(value.apply)
    _, _, given = text.removesuffix(")").partition("(")
    wanted = [word for word in given.split(", ") if word]
    if "(" not in text or differs(door, module, bare(text)):
        return
    ours = inspect.signature(value).parameters
    if "/" in wanted:
        positional = [one for one in ours.values() if one.kind is not one.KEYWORD_ONLY]
        assert len(positional) >= len(wanted) - 1
    elif all(one.kind is not one.VAR_KEYWORD for one in ours.values()):
        assert set(wanted) <= set(ours)


def differs(door: str, module: str, name: str) -> bool:
    """Whether a name takes other parameters than the published, for a reason that is given."""
    return f"{module}.{name}".lstrip(".") in reasons().get("parameters", {}).get(door, {})


def test_what_is_out_of_scope_is_not_there_and_published() -> None:
    for door, places in reasons().items():
        if door == "parameters":
            continue
        for place, reason in places.items():
            own = [
                (module, bare(text))
                for named, module, text in PUBLISHED
                if named == door and f"{module}.{bare(text)}.".lstrip(".").startswith(f"{place}.")
            ]
            assert own, f"{door}.{place} is not published"
            assert len(reason) > 3
            for module, name in own:
                try:
                    found(door, f"{module}.{name}".lstrip("."))
                except (AttributeError, ImportError):
                    continue
                pytest.fail(f"{door}.{module}.{name} is there, and out of scope: {reason}")


def test_names_are_read_from_archives(tmp_path: Path) -> None:
    """Of a source archive: what counts as a name, and what it takes."""
    files = {
        "__init__.py": "from flash_attn.a import f\nfrom torch import nn\n__version__ = '1'\n",
        "a.py": (
            "from torch.autograd import Function\n"
            "class F(Function):\n    def forward(ctx, x, y=1): ...\n"
            "f = F.apply\n"
            "class M:\n    def __init__(self, dim, *, base): ...\n"
            "try:\n    import triton\nexcept ImportError:\n    fast = None\n"
            "def g(a, /, b, *c, d, **e): ...\n"
            "_hidden, a.attribute = 1, 2\n"
        ),
        "empty/__init__.py": "",
    }
    archive = tmp_path / "flash_attn-9.9.tar.gz"
    wheel = tmp_path / "flash_attn-9.9-py3-none-any.whl"
    with tarfile.open(archive, "w:gz") as tar, zipfile.ZipFile(wheel, "w") as zipped:
        for name, text in files.items():
            path = tmp_path / "file"
            path.write_text(text)
            tar.add(path, f"flash_attn-9.9/flash_attn/{name}")
            zipped.writestr(f"flash_attn/{name}", text)
    wanted = {
        "": ["f", "__version__"],
        "a": ["F.apply", "f(x, y, /)", "M(dim, base)", "fast", "g(a, b, d)"],
    }
    for path in (archive, wheel):
        assert archives_of([path]) == {"flash_attn": ("9.9", path.name, wanted)}


@cache
def uses() -> dict[Any, list[str]]:
    """Objects of the doors, by identity, and the tests that mention them."""
    mentioned: dict[Any, set[str]] = {}
    for path in sorted(
        [
            *(ROOT / "tests/cpu/compat").glob("test_*.py"),
            *(ROOT / "tests/gpu").glob("test_compat*.py"),
        ]
    ):
        tree = ast.parse(path.read_text())
        names = imported(tree)
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for test in functions.values():
            if test.name.startswith("test_"):
                for value in mentions(test, functions, names, set()):
                    where = f"{path.relative_to(ROOT)}::{test.name}"
                    mentioned.setdefault(value, set()).add(where)
    return {key: sorted(tests) for key, tests in mentioned.items()}


def imported(tree: ast.Module) -> dict[str, Any]:
    """What a test module has from the doors, by the names that it uses."""
    names: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jitattn.compat"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                try:
                    value = getattr(module, alias.name)
                except AttributeError:
                    value = importlib.import_module(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = value
    for node in tree.body:  # other names for them
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = resolved(node.value, names)
            if value is not None:
                names[node.targets[0].id] = value
    return names


def resolved(node: ast.AST, names: dict[str, Any]) -> Any:
    """What an expression of names and attributes stands for; None if not one of ours."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        base = resolved(node.value, names)
        return None if base is None else getattr(base, node.attr, None)
    return None


def mentions(
    node: ast.FunctionDef,
    functions: dict[str, ast.FunctionDef],
    names: dict[str, Any],
    seen: set[str],
) -> set[Any]:
    """Names, and hashable values, that a function and those that it calls mention."""
    seen.add(node.name)
    values: set[Any] = set()
    for inner in ast.walk(node):
        value = resolved(inner, names)
        if value is not None and not inspect.ismodule(value):
            values.add(key_of(value))
        if isinstance(inner, ast.Attribute):
            values.add(f".{inner.attr}")
        if isinstance(inner, ast.Name) and inner.id in functions and inner.id not in seen:
            values |= mentions(functions[inner.id], functions, names, seen)
    return values


def key_of(value: Any) -> Any:
    return value if isinstance(value, int | str) else id(value)


def covering(door: str, name: str) -> list[str]:
    """The tests that mention a name of a door."""
    value = found(door, name)
    parts = name.split(".")
    if len(parts) > 1 and parts[-2][0].isupper():  # a method
        owner = found(door, ".".join(parts[:-1]))
        tests = uses().get(key_of(owner), [])
        called = parts[-1] == "forward"
        return [one for one in tests if called or one in uses().get(f".{parts[-1]}", [])]
    if not callable(value):
        return uses().get(f".{parts[-1]}", [])
    return uses().get(key_of(value), [])


def names_with_tests() -> list[tuple[str, str]]:
    """Names of both tables, but for modules, whose names have tests."""
    seeds = dict.fromkeys(ALL)
    for door, module, text in IN_SCOPE:
        seeds[door, f"{module}.{bare(text)}".lstrip(".")] = None
    return [one for one in seeds if not inspect.ismodule(found(*one))]


@pytest.mark.parametrize(("door", "name"), names_with_tests())
def test_a_name_has_a_test(door: str, name: str) -> None:
    assert covering(door, name)


def test_a_name_without_a_test_is_noticed() -> None:
    assert not uses().get(key_of(found), [])
    assert ".no_such_name" not in uses()


def test_the_table_is_written(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = Path(request.config.getoption("--names-table") or tmp_path / "names.md")
    lines = ["| name | tests |", "|---|---|"]
    lines += [
        f"| `{door}.{name}` | {', '.join(f'`{one}`' for one in covering(door, name))} |"
        for door, name in ALL
    ]
    path.write_text("\n".join(lines) + "\n")
    assert len(path.read_text().splitlines()) == len(ALL) + 2

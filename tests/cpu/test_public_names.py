"""Every public name of the five systems is there, takes what it took, and has a test.

``pytest tests/cpu/test_public_names.py --names-table FILE`` writes the table of names and tests.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jitattn.compat import DOORS

ROOT = Path(__file__).resolve().parents[2]
NAMES: dict[str, dict[str, str]] = tomllib.loads(
    (ROOT / "tests" / "data" / "public_names.toml").read_text()
)
ALL = [(door, name) for door, names in NAMES.items() for name in names]


def found(door: str, name: str) -> Any:
    """What a name stands for."""
    module, parts = importlib.import_module(DOORS[door]), name.split(".")
    while parts:
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


@cache
def uses() -> dict[Any, list[str]]:
    """Objects of the doors, by identity, and the tests that mention them."""
    mentioned: dict[Any, set[str]] = {}
    for path in sorted((ROOT / "tests").glob("[cg]pu/test_compat*.py")):
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
    if NAMES[door][name] == "=":
        return uses().get(f".{parts[-1]}", [])
    return uses().get(key_of(value), [])


@pytest.mark.parametrize(("door", "name"), ALL)
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

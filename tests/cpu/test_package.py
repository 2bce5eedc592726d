"""What importing does not do, and who may import whom."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jitattn"
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
#: From the top to the bottom. A folder imports what stands below it, and nothing above.
ORDER = (
    "compat",
    "cli",
    "api",
    "run",
    "reference",
    "cpu",
    "plan",
    "kernels",
    "request",
    "jit",
    "cache",
    "patterns",
    "values",
    "spec",
    "errors",
)


def imports_at_run_time(path: Path) -> set[str]:
    """Modules that a file imports, those for type checkers aside."""
    tree = ast.parse((ROOT / path).read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(str(node.module))
    return found


def room(module: str) -> str:
    """The folder, or the file beside them, that a module is in; "" is the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_order_names_every_room() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "py", "__pycache__"} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=map(str, MODULES))
def test_imports_point_down(path: Path) -> None:
    own = room(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    below = ORDER[ORDER.index(own) :] if own else ORDER
    found = {name for name in imports_at_run_time(path) if name.startswith("jitattn.")}
    assert {room(name) for name in found} - {"__version__"} <= set(below)


def test_modules_of_a_room_form_no_circle() -> None:
    graph = {}
    for path in MODULES:
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        if room(name) != "compat":  # laid out as the originals are, circles included
            graph[name] = imports_at_run_time(path)
    for name in graph:
        # A module names its own package where it imports a neighbour from it.
        others = graph[name] & graph.keys()
        graph[name] = {other for other in others if not f"{name}.".startswith(f"{other}.")}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_reference_is_its_own() -> None:
    """It shares no code with what it judges, but for values and the guard of MKL's first call."""
    found = imports_at_run_time(Path("jitattn/reference.py"))
    mine = {name for name in found if name.startswith("jitattn.")}
    assert {room(name) for name in mine} <= {"values", "errors", "cpu"}
    assert {name for name in mine if room(name) == "cpu"} <= {
        "jitattn.cpu.vector_math",
        "jitattn.cpu.vector_math.settle_vml",
    }


def test_lower_half_needs_neither_torch_nor_cupy() -> None:
    rooms = ("cli", "plan", "kernels", "cache", "spec")
    modules = [".".join(path.with_suffix("").parts) for path in MODULES]
    lower = [name.removesuffix(".__init__") for name in modules if room(name) in rooms]
    lower.remove("jitattn.cli.__main__")  # which runs a command
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {lower}];"
        "import jitattn.jit.pool;"
        "print(sorted({'torch', 'cupy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_import_loads_neither_torch_nor_cupy() -> None:
    code = (
        "import sys, jitattn; jitattn.Causal(); jitattn.InvalidInputError;"
        "print(sorted({'torch', 'cupy', 'numpy', 'filelock'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    import jitattn

    for name in jitattn.__all__:
        assert getattr(jitattn, name) is not None
    assert callable(jitattn.attention)
    assert callable(jitattn.explain)
    with pytest.raises(AttributeError, match="nothing"):
        jitattn.nothing  # noqa: B018


CUDA_FILES = sorted(
    path.relative_to(ROOT / "cuda_src")
    for path in (ROOT / "cuda_src").rglob("*")
    if path.suffix in (".cu", ".cuh")
)


@pytest.mark.parametrize("path", CUDA_FILES, ids=map(str, CUDA_FILES))
def test_cuda_include_rules(path: Path) -> None:
    text = (ROOT / "cuda_src" / path).read_text()
    included = re.findall(r'#include (["<].*?[">])', text)
    own = path.as_posix()
    kernels = {'"jitattn/fwd_sm80.cuh"', '"jitattn/merge.cuh"'}
    if own.startswith("jitattn/ptx/"):
        assert set(included) <= {'"jitattn/types.cuh"'}
    else:
        assert not re.search(r"\basm\b", text)
    if not own.startswith("entry/"):
        assert not kernels & set(included)
        assert text.count("#pragma once") == 1
    for name in included:
        assert name.startswith('"jitattn/') or name == '"jitattn_spec.h"'

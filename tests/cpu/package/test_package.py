"""Tests side effects of importing, and the import order of the layers."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "jitattn"
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
#: From the top to the bottom. A folder imports what stands below it, and nothing above.
ORDER = (
    "demo",
    "compat",
    "integrations",
    "distributed",
    "cli",
    "api",
    "patterns",
    "run",
    "reference",
    "cpu",
    "plan",
    "kernels",
    "request",
    "jit",
    "cache",
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
    own = module.split(".")[1] if "." in module else ""
    return "" if own == "__main__" else own


def test_order_names_every_room() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__main__", "py", "__pycache__"} == set(ORDER)


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


def test_files_of_tests_are_short() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in (ROOT / "tests").rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_reference_is_its_own() -> None:
    """It shares no code with what it judges, but for values and the guard of MKL's first call."""
    files = [path for path in MODULES if path.parts[:2] == ("jitattn", "reference")]
    assert len(files) > 1
    found = set().union(*map(imports_at_run_time, files))
    mine = {name for name in found if name.startswith("jitattn.")}
    assert {room(name) for name in mine} <= {"reference", "values", "errors", "cpu"}
    assert {name for name in mine if room(name) == "cpu"} <= {
        "jitattn.cpu.mkl_warmup",
        "jitattn.cpu.mkl_warmup.mkl_warmup",
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


#: Folders of device code below cuda_src/jitattn, and those that each may include beside itself.
#: The files beside them (types, enums, params, debug) may be included by all but ptx.
CUDA_FOLDERS = {
    "ptx": (),
    "tile": ("ptx",),
    "attention": ("ptx", "tile"),
    "fwd": ("ptx", "tile", "attention"),
    "bwd": ("ptx", "tile", "attention"),
    "prepare": ("ptx", "tile", "attention"),
    "kvcache": ("ptx", "tile", "attention"),
    "combine": ("ptx", "tile", "attention"),
}
#: Lines that a file, and a function of one, may have.
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 80


def _functions(text: str) -> dict[str, int]:
    """Lines of each device function of a file by name, from its return type to its last brace."""
    found: dict[str, int] = {}
    lines = text.split("\n")
    for first, line in enumerate(lines):
        match = re.search(r"__(?:device|global)__.*", line)
        if match is None or line.lstrip().startswith("//"):
            continue
        head = " ".join(lines[first : first + 8])
        named = re.search(r"(\w+|operator\S+)\(", re.sub(r"__launch_bounds__\(.*?\)", "", head))
        assert named is not None, line
        depth, has_body = 0, False
        for last in range(first, len(lines)):
            code = re.sub(r'"[^"]*"', "", lines[last])
            depth += code.count("{") - code.count("}")
            has_body = has_body or "{" in lines[last]
            if depth == 0 and lines[last].endswith(";") and not has_body:
                break  # a declaration
            if depth == 0 and has_body and lines[last].endswith("}"):
                found[named[1]] = max(found.get(named[1], 0), last - first + 1)
                break
        else:
            raise AssertionError(f"no end of {named[1]}")
    return found


@pytest.mark.parametrize("path", CUDA_FILES, ids=map(str, CUDA_FILES))
def test_cuda_sizes(path: Path) -> None:
    text = (ROOT / "cuda_src" / path).read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    functions = _functions(text)
    if path.suffix == ".cu":
        assert len(functions) == 1
    for name, length in functions.items():
        assert length <= MAX_FUNCTION_LINES, name


@pytest.mark.parametrize("path", CUDA_FILES, ids=map(str, CUDA_FILES))
def test_cuda_include_rules(path: Path) -> None:
    text = (ROOT / "cuda_src" / path).read_text()
    included = re.findall(r'#include (["<].*?[">])', text)
    own = path.as_posix()
    kernels = {f'"{path.as_posix()}"' for path in CUDA_FILES if path.name == "kernel.cuh"}
    assert kernels
    folder = path.parts[1] if len(path.parts) > 2 else ""
    if path.parts[0] == "jitattn" and folder:
        for name in included:
            parts = name.strip('"').split("/")
            if len(parts) > 2:
                assert parts[1] in (folder, *CUDA_FOLDERS[folder]), name
    if own.startswith("jitattn/ptx/"):
        beside = {name for name in included if name.startswith(f'"{path.parent.as_posix()}/')}
        assert set(included) - beside <= {'"jitattn/types.cuh"'}
    else:
        assert not re.search(r"\basm\b", text)
    if not own.startswith("entry/"):
        assert not kernels & set(included)
        assert text.count("#pragma once") == 1
    for name in included:
        assert name.startswith('"jitattn/') or name == '"jitattn_spec.h"'

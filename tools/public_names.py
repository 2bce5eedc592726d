"""Compares public names of published packages with `jitattn.compat`. Runs none of their code.

``python tools/public_names.py flash_attn-2.8.3.tar.gz …`` reads wheels and source archives, as
``pip download --no-deps`` leaves them, and prints names that the door lacks, except those with a
reason in tests/data/names_out_of_scope.toml; exits 1 if there are any. ``--write`` puts the names
into tests/data/published_names.toml, which tests/cpu/package/test_public_names.py checks without
the archives.

A name is public if a module of the package defines it, or its ``__init__`` imports it from the
package, and it does not begin with an underscore.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _table import say

from jitattn.compat import DOORS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).resolve().parents[1]
TABLE: Final = ROOT / "tests" / "data" / "published_names.toml"
OUT_OF_SCOPE: Final = ROOT / "tests" / "data" / "names_out_of_scope.toml"
#: Packages whose modules lie in another's: how their archives name them, and the package.
_WITHIN: Final = {"flash_attn_4": "flash_attn"}
_HEADER: Final = """\
# Public names of the published packages whose work our front doors do, by module, with parameters.
# Made by tools/public_names.py from the archives named here; do not edit.
"""


def sources(archive: Path) -> Iterator[tuple[str, str]]:
    """Yield path and text of every Python file of a wheel or a source archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.endswith(".py"):
                    yield name, wheel.read(name).decode()
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            file = tar.extractfile(member) if path.endswith(".py") else None
            if file is not None:
                yield path, file.read().decode()


def modules_of(archive: Path, package: str) -> dict[str, list[str]]:
    """Return the public names of every module of a package; "" is the package itself."""
    found = {}
    for path, text in sources(archive):
        parts = path.removesuffix(".py").split("/")
        if parts[0] != package:
            continue
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[1 : -1 if is_package else None])
        names = names_of(ast.parse(text), package, is_package=is_package)
        if names:
            found[module] = names
    return dict(sorted(found.items()))


def names_of(tree: ast.Module, package: str, *, is_package: bool) -> list[str]:
    """Return the public names of a module: `name`, `name(parameters)`, or `name.apply`."""
    statements = list(flat(tree.body))
    classes = [node for node in statements if isinstance(node, ast.ClassDef)]
    forward = {
        node.name: parameters(own)[1:]
        for node in classes
        if is_autograd_function(node)
        for own in node.body
        if isinstance(own, ast.FunctionDef) and own.name == "forward"
    }
    found: dict[str, str] = {}
    for node in statements:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = f"{node.name}({', '.join(parameters(node))})"
        elif isinstance(node, ast.ClassDef):
            found[node.name] = f"{node.name}.apply" if node.name in forward else node.name
            for own in node.body:
                if isinstance(own, ast.FunctionDef) and own.name == "__init__":
                    found[node.name] = f"{node.name}({', '.join(parameters(own)[1:])})"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            value = node.value
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if not isinstance(target, ast.Name):
                    continue
                found.setdefault(target.id, target.id)
                if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
                    given = forward.get(value.value.id) if value.attr == "apply" else None
                    if given is not None:  # apply takes no keywords
                        found[target.id] = f"{target.id}({', '.join([*given, '/'])})"
        elif isinstance(node, ast.ImportFrom) and is_package and is_own(node, package):
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, alias.asname or alias.name)
    return [text for name, text in found.items() if name[0] != "_" or name == "__version__"]


def is_own(node: ast.ImportFrom, package: str) -> bool:
    """Return whether an import is from the package."""
    return node.level > 0 or (node.module or "").partition(".")[0] == package


def flat(nodes: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, including those under if, try and with."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from flat(node.body)
            yield from flat(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from flat(handler.body)


def is_autograd_function(node: ast.ClassDef) -> bool:
    """Return whether a class is a `torch.autograd.Function`."""
    return any(ast.unparse(base).rpartition(".")[2] == "Function" for base in node.bases)


def parameters(node: ast.FunctionDef) -> list[str]:
    """Return the names of a function's parameters, except *args and **kwargs."""
    own = node.args
    return [argument.arg for argument in (*own.posonlyargs, *own.args, *own.kwonlyargs)]


def package_of(archive: Path) -> tuple[str, str]:
    """Return package and version from the name of an archive."""
    package, version, *_ = archive.name.removesuffix(".tar.gz").split("-")
    if _WITHIN.get(package, package) not in DOORS:
        raise SystemExit(f"{archive.name}: {package} is none of {', '.join(DOORS)}")
    return package, version


def door_of(package: str) -> str:
    """Return the module of ours that has the names of a package."""
    return DOORS[_WITHIN.get(package, package)]


def archives_of(archives: Sequence[Path]) -> dict[str, tuple[str, str, dict[str, list[str]]]]:
    """Read archives: package → version, name of the archive, names by module."""
    table = {}
    for archive in archives:
        package, version = package_of(archive)
        modules = modules_of(archive, _WITHIN.get(package, package))
        table[package] = (version, archive.name, modules)
    return table


def published() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Read the table: package → "modules" → names of each, and its version."""
    return tomllib.loads(TABLE.read_text())


def reasons() -> dict[str, dict[str, str]]:
    """Read the names out of scope: package → module or module.name → reason."""
    return tomllib.loads(OUT_OF_SCOPE.read_text())


def reason_for(package: str, module: str, name: str) -> str | None:
    """Return the reason why a name, its module or a parent module is out of scope, if any."""
    own = reasons().get(package, {})
    place = f"{module}.{name}".lstrip(".")
    while place:
        if place in own:
            return own[place]
        place = place.rpartition(".")[0]
    return None


def bare(text: str) -> str:
    """Strip parameters and attributes: 'f(a, b)' → 'f', 'F.apply' → 'F'."""
    return text.partition("(")[0].partition(".")[0]


def lacking(package: str, modules: dict[str, list[str]]) -> list[str]:
    """Return the names in scope that the door lacks."""
    import importlib

    missing = []
    for module, names in modules.items():
        for text in names:
            if reason_for(package, module, bare(text)) is not None:
                continue
            place = ".".join(filter(None, (door_of(package), module)))
            try:
                own = importlib.import_module(place)
            except ImportError:
                own = None
            if not hasattr(own, bare(text)):
                missing.append(f"{package}.{module}.{text}".replace("..", "."))
    return missing


def render(table: dict[str, tuple[str, str, dict[str, list[str]]]]) -> str:
    """Return the text of the table."""
    lines = [_HEADER]
    for package, (version, archive, modules) in sorted(table.items()):
        lines += [f"[{package}]", f'version = "{version}"', f'archive = "{archive}"', ""]
        lines.append(f"[{package}.modules]")
        for module, names in modules.items():
            lines.append(f'"{module}" = [')
            lines += [f'  "{name}",' for name in names]
            lines.append("]")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare archives with the doors; return 1 if a name is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archives", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    arguments = parser.parse_args(argv)
    table = archives_of(arguments.archives)
    if arguments.write:
        TABLE.write_text(render(table))
    missing = [line for package, (*_, names) in table.items() for line in lacking(package, names)]
    for line in missing:
        say(line)
    count = sum(len(names) for *_, modules in table.values() for names in modules.values())
    say(f"{count} public names of {', '.join(table)}; {len(missing)} missing")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Tests that workers import the same package as their parent, whatever the directory names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jitattn.jit import pool
from tests.cpu.specs import combine_spec

ROOT = Path(__file__).parents[3]
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs a separator that names may hold")
_BUILD = """
import json, sys
sys.path[:0] = {path!r}
import jitattn
from jitattn.jit import pool
from jitattn.plan import choices
choice = {{"family": "combine", "dtype": "bf16", "head_dim": [16, 32], "arch": 80}}
found = list(pool.build_all(choices.specs_of([choice]), 2))
print(json.dumps([jitattn.__file__, [(one.origin, one.error) for one in found]]))
"""
#: Modules that workers import early, from the standard library and from site-packages.
HOSTILE = ("json", "base64", "platformdirs", "filelock", "sitecustomize", "jitattn", "dataclasses")


def lay_traps(folder: Path, witness: Path) -> None:
    """Fill a folder with modules that leave a trace when they are imported."""
    folder.mkdir(parents=True, exist_ok=True)
    trap = f"open({str(witness)!r}, 'a').write(__name__ + ' in ' + __file__ + chr(10))\n"
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(trap)


def install(folder: Path) -> Path:
    """Put a copy of the package into a folder."""
    shutil.copytree(
        ROOT / "jitattn", folder / "jitattn", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "cuda_src", folder / "cuda_src")
    return folder


def build(path: list[str], work: Path, **environment: str) -> list[str]:
    """Build with workers in a fresh process; its origins. The jitattn is that of `path[0]`."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _BUILD.format(path=path)],
        cwd=work,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, found = json.loads(done.stdout)
    assert file.startswith(path[0])
    assert [error for _, error in found if error] == []
    return [origin for origin, _ in found]


@POSIX
@pytest.mark.parametrize("name", ["a:b", ":", "a:", "a:jitattn", "a\nb", "ä\udcff"])
def test_install_path_with_a_separator(tmp_path: Path, name: str) -> None:
    """Split at the colon, the rest of it would be looked for in the working directory."""
    try:
        here = install(tmp_path / "install" / name)
    except OSError as error:
        pytest.skip(f"no such name on this filesystem: {error}")
    witness, work = tmp_path / "witness", tmp_path / "work"
    for trap in (work, work / "b", work / "jitattn", work / "b" / "jitattn"):
        lay_traps(trap, witness)
    assert build([str(here)], work) == ["compiled"] * 2
    assert not witness.exists(), witness.read_text()


@POSIX
@pytest.mark.parametrize("entry", [":", "/nonexistent:", ":/nonexistent", "/x:b:/y"])
def test_sys_path_with_a_separator(tmp_path: Path, entry: str) -> None:
    witness, work = tmp_path / "witness", tmp_path / "work"
    for trap in (work, work / "b"):
        lay_traps(trap, witness)
    assert build([str(ROOT), entry], work) == ["compiled"] * 2
    assert not witness.exists(), witness.read_text()


def test_another_copy_is_not_taken(tmp_path: Path) -> None:
    """One that is earlier on the path of the worker, or that PYTHONPATH names."""
    other, witness = tmp_path / "other", tmp_path / "witness"
    lay_traps(other, witness)
    for name in HOSTILE:
        if name != "jitattn":
            (other / f"{name}.py").unlink()
    code = f"import jitattn\nsys.path[:0] = [{str(other)!r}]\n"
    script = _BUILD.format(path=[str(ROOT)]).replace("import jitattn\n", code)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=other,
        env={**os.environ, "PYTHONPATH": str(other)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[1] == [["compiled", ""]] * 2
    assert not witness.exists(), witness.read_text()


def test_what_the_parent_imports_from_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its order, made absolute, and without the working directory."""
    (tmp_path / "lib").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "lib", "/one:two", *sys.path])
    assert pool._import_path()[:2] == [str(tmp_path / "lib"), "/one:two"]
    specs = [combine_spec(head_dim_v=dim) for dim in (16, 32)]
    assert [one.origin for one in pool.build_all(specs, 2)] == ["compiled"] * 2

"""Tests that one kernel of each spec class compiles without unlisted spills; CI compiles all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jitattn.cache.entry import sha256
from jitattn.jit import build

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_matrix(arch: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    cache = request.config.getoption("--matrix-cache") or tmp_path
    done = subprocess.run(
        [sys.executable, "tools/compile_matrix.py", "--arch", arch, "--short", "--json"],
        cwd=ROOT,
        env={**os.environ, "JITATTN_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len(figures) >= 14
    assert {row["spec"]["arch"].removesuffix("a") for row in figures} == {arch}
    assert all(row["registers"] > 0 for row in figures)


def test_every_matrix_can_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import compile_matrix

    counts = {}
    for arch in (*compile_matrix.TUNED, *compile_matrix.UNTUNED):
        specs = compile_matrix.matrix(arch)
        assert {spec.arch.removesuffix("a") for spec in specs} == {arch}
        assert len(compile_matrix.matrix(arch, full=True)) > len(specs)
        counts[arch] = len(specs)
    # Those with a tile table of their own get more than one kernel for each class of the spec.
    assert min(counts[arch] for arch in compile_matrix.TUNED) > 300


def test_figures_are_kept_by_the_key_that_they_were_made_under(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import _figures
    import compile_matrix

    path, load, save = tmp_path / "figures.json", _figures.load, _figures.save
    monkeypatch.setattr(_figures, "load", lambda: load(path))
    monkeypatch.setattr(_figures, "save", lambda rows, compiler: save(rows, compiler, path))
    specs = [s for s in compile_matrix.matrix("sm_90", short=True) if s.family == "combine"]
    built = [compile_matrix.build_one(spec) for spec in specs]
    assert not any(row.error for row in built)
    assert compile_matrix.kept(specs) == {}
    compile_matrix.update(built)
    for spec, row in zip(specs, built, strict=True):
        found = compile_matrix.kept(specs)[spec]
        assert (found.registers, found.key, found.origin) == (row.registers, row.key, "kept")
    for row in built:
        assert compile_matrix.verified(row, replace(row, compile_ms=1.0)) == row
        wrong = compile_matrix.verified(row, replace(row, registers=row.registers + 1))
        assert compile_matrix.problems([wrong], ()) == [
            f"{row.name}: kept figures are wrong: registers {row.registers}, kept as "
            f"{row.registers + 1}"
        ]
    monkeypatch.setattr("jitattn.jit.build.key_of", lambda _: "0" * 64)  # of other sources
    assert compile_matrix.kept(specs) == {}
    with pytest.raises(ValueError, match="several compilers"):
        compile_matrix.update([*built, compile_matrix.Figures({}, compiler="another")])


def test_all_kept_figures_are_verified_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import compile_matrix

    specs = compile_matrix.matrix("sm_90")
    known = {
        spec: compile_matrix.Figures(spec.to_dict(), key=sha256(spec.to_key().encode()))
        for spec in specs
    }
    parts = [compile_matrix.sample(known, 10, part) for part in range(3, 13)]
    assert all(parts)
    assert sorted(spec.to_key() for part in parts for spec in part) == sorted(
        spec.to_key() for spec in specs
    )
    assert compile_matrix.parse_verify("10:3") == (10, 3)
    assert compile_matrix.parse_verify("10")[0] == 10
    for wrong in ("0", "-1:2", "x", ""):
        with pytest.raises(ValueError, match=r"one of|invalid literal"):
            compile_matrix.parse_verify(wrong)


def test_figures_that_are_found_wrong_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import _figures
    import compile_matrix

    specs = [s for s in compile_matrix.matrix("sm_90", short=True) if s.family == "combine"][:1]
    monkeypatch.setattr(compile_matrix, "matrix", lambda *_, **__: specs)
    path, load = tmp_path / "figures.json", _figures.load
    monkeypatch.setattr(_figures, "load", lambda: load(path))
    given = {"full": False, "short": True, "jobs": 1, "quiet": True}
    (row,) = compile_matrix.collect(["sm_90"], **given)
    values = [getattr(row, name) for name in _figures.FIELDS]
    for kept, is_wrong in ((values, False), ([values[0] + 1, *values[1:]], True)):
        _figures.save({row.key: kept}, row.compiler, path)
        (found,) = compile_matrix.collect(["sm_90"], **given)
        assert (found.origin, found.registers) == ("kept", kept[0])
        (found,) = compile_matrix.collect(["sm_90"], **given, verify=(1, 0))
        assert found.registers == values[0]
        assert ("kept figures are wrong" in found.error) == is_wrong


def test_kept_figures_are_of_the_compiler_of_the_constraints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import _figures

    figures, compiler = _figures.load()
    constraints = (ROOT / "tools" / "constraints.txt").read_text()
    version = re.search(r"^nvidia-cuda-nvrtc==(\S+)$", constraints, re.MULTILINE)
    assert version is not None
    # With figures of another compiler, CI would find none of its own and compile everything.
    assert not figures or compiler == f"nvrtc {version[1]}"


def test_a_kernel_with_a_warning_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import compile_matrix

    (spec, *_) = [s for s in compile_matrix.matrix("sm_90", short=True) if s.family == "combine"]
    built = build.build(spec)
    assert compile_matrix.warning_in(built.metadata.log) == ""
    for line in (
        'a.cuh(1): warning #177-D: variable "x" was declared but never referenced',
        "ptxas warning : Value of threads per SM is out of range",
    ):
        log = f"{built.metadata.log}\n{line}\nRemark: The warnings can be suppressed"
        noisy = replace(built, metadata=replace(built.metadata, log=log))
        monkeypatch.setattr(build, "build", lambda _, found=noisy: found)
        row = compile_matrix.build_one(spec)
        assert compile_matrix.problems([row], ()) == [f"{row.name}: the compiler warns: {line}"]

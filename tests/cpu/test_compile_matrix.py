"""One kernel for each class of the spec compiles, with no unlisted spill; CI compiles all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_matrix(arch: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/compile_matrix.py", "--arch", arch, "--short", "--json"],
        cwd=ROOT,
        env={**os.environ, "JITATTN_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len(figures) >= 14
    assert {row["spec"]["arch"] for row in figures} == {arch}
    assert all(row["registers"] > 0 for row in figures)


def test_every_matrix_can_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import compile_matrix

    counts = {}
    for arch in (*compile_matrix.TUNED, *compile_matrix.UNTUNED):
        specs = compile_matrix.matrix(arch)
        assert {spec.arch for spec in specs} == {arch}
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
    specs = [s for s in compile_matrix.matrix("sm_90", short=True) if s.family == "merge"]
    built = [compile_matrix.build_one(spec) for spec in specs]
    assert not any(row.error for row in built)
    assert compile_matrix.kept(specs) == {}
    compile_matrix.update(built)
    for spec, row in zip(specs, built, strict=True):
        found = compile_matrix.kept(specs)[spec]
        assert (found.registers, found.key, found.origin) == (row.registers, row.key, "kept")
    monkeypatch.setattr("jitattn.jit.build.key_of", lambda _: "0" * 64)  # of other sources
    assert compile_matrix.kept(specs) == {}
    with pytest.raises(ValueError, match="several compilers"):
        compile_matrix.update([*built, compile_matrix.Figures({}, compiler="another")])

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

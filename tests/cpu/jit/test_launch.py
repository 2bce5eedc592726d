"""Tests the launcher without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("home", ["/nonexistent", "/proc"])
def test_cupy_imports_without_a_home(home: str) -> None:
    pytest.importorskip("cupy")
    environment = {key: value for key, value in os.environ.items() if key != "CUPY_CACHE_DIR"}
    code = "from jitattn.jit.launch import import_cupy; print(import_cupy().__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HOME": home, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "cupy", done.stderr

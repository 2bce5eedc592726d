"""Tests the launcher without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jitattn.jit import launch

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


@pytest.mark.parametrize("context", [0, 4711])
def test_a_context_is_made_only_where_there_is_none(
    context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making one frees an address, which would end the capture of a graph."""
    freed: list[int] = []
    cuda = SimpleNamespace(
        driver=SimpleNamespace(ctxGetCurrent=lambda: context),
        runtime=SimpleNamespace(free=freed.append),
    )
    monkeypatch.setattr(launch, "import_cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(launch.tensor_maps, "is_available", lambda: True)
    assert launch.encodes_maps()
    assert freed == ([] if context else [0])

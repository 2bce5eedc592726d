"""A cache of its own for every test, and nothing left in the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jitattn.jit import build, cache, settings


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point the cache at an empty directory and forget what the process has built."""
    root = tmp_path / "cache"
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(root))
    for name in settings.VARIABLES.keys() - {"JITATTN_CACHE_DIR"}:
        monkeypatch.delenv(name, raising=False)
    build.clear_memory()
    cache._warned.clear()
    yield root
    build.clear_memory()

"""A cache of its own for every test, and nothing left in the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jitattn.jit import build, cache, files, record, settings
from jitattn.jit.cache import DiskCache

from .specs import CACHED


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point the cache at an empty directory and forget what the process has built."""
    root = tmp_path / "cache"
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(root))
    for name in settings.VARIABLES.keys() - {"JITATTN_CACHE_DIR"}:
        monkeypatch.delenv(name, raising=False)
    _forget()
    yield root
    _forget()


@pytest.fixture
def filled(cache_dir: Path) -> DiskCache:
    """A cache with three kernels."""
    for spec in CACHED:
        build.build(spec)
    return DiskCache(cache_dir)


def _forget() -> None:
    build.clear_memory()
    files._warned.clear()
    record._noted.clear()
    cache._find_root.cache_clear()
    cache._cache_at.cache_clear()

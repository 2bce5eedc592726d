"""Gives every test its own cache, and resets process state afterwards."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitattn.cache import directory, files, location, settings
from jitattn.cache import disk as cache
from jitattn.cache.disk import DiskCache
from jitattn.jit import build, record

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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 64 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small filesystem")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches of Windows: no owners and modes, no links to refuse, no open directories."""
    monkeypatch.setattr(files, "HAS_OWNERS", False)
    monkeypatch.setattr(files, "OPEN_FLAGS", 0)
    monkeypatch.setattr(directory, "HAS_DESCRIPTORS", False)


def _forget() -> None:
    build.clear_memory()
    files._warned.clear()
    record._noted.clear()
    location._found.cache_clear()
    cache._cache_at.cache_clear()

"""Tests the fallback location of the cache, and the limits of `clear` there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jitattn.cache import disk as cache
from jitattn.cache import location, settings
from jitattn.cache.disk import DiskCache
from jitattn.cache.files import HAS_OWNERS
from jitattn.errors import InvalidInputError
from jitattn.jit import build
from tests.cpu.specs import combine_spec

POSIX = pytest.mark.skipif(not HAS_OWNERS, reason="needs POSIX owners and modes")


@pytest.fixture
def home_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform's cache directory cannot be made."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.delenv("JITATTN_CACHE_DIR")
    monkeypatch.setattr(
        location.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "file" / "jitattn")
    )


@POSIX
@pytest.mark.usefixtures("home_in_the_way")
def test_home_that_cannot_be_written_gives_way_to_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(location.tempfile, "gettempdir", lambda: str(tmp_path))
    assert build.build(combine_spec()).origin == "compiled"
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"
    assert (tmp_path / f"jitattn-{os.geteuid()}" / "v1").is_dir()


@pytest.mark.usefixtures("home_in_the_way")
def test_no_directory_at_all_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(location.tempfile, "gettempdir", none)
    assert cache.user_cache() is None
    assert build.build(combine_spec()).origin == "compiled"


@pytest.mark.usefixtures("home_in_the_way")
def test_working_directory_is_never_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(location.tempfile, "gettempdir", os.getcwd)  # what tempfile falls back to
    assert cache.user_cache() is None
    location._found.cache_clear()
    monkeypatch.setattr(location.platformdirs, "user_cache_dir", lambda *_, **__: "jitattn")
    assert cache.user_cache() is None
    assert list(work.iterdir()) == []


def test_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("JITATTN_CACHE_DIR", "~/kernels")
    assert settings.cache_dir() == tmp_path / "kernels"
    monkeypatch.setenv("JITATTN_CACHE_DIR", "~nobody-of-this-name/kernels")
    with pytest.raises(InvalidInputError, match=r"JITATTN_CACHE_DIR='~nobody.*whole path"):
        settings.cache_dir()


@POSIX
def test_clear_follows_no_links_and_knows_its_names(cache_dir: Path, tmp_path: Path) -> None:
    built = build.build(combine_spec())
    store = cache_dir / "v1"
    outside = tmp_path / "outside"
    outside.mkdir()
    foreign = [
        outside / f"{'0' * 62}.json",  # reached through a link only
        store / built.key[:2] / "notes.json",
        store / "tmp" / "notes.txt",
        store / "lock" / "notes.txt",
    ]
    for path in foreign:
        path.write_text("not of the cache")
    (store / "00").symlink_to(outside)
    assert DiskCache(cache_dir).clear() == 1
    assert [path for path in foreign if not path.exists()] == []
    assert list(store.rglob("*.cubin")) == []


def test_clear_spares_a_writer_at_work(cache_dir: Path) -> None:
    build.build(combine_spec())
    fresh, stale = (cache_dir / "v1" / "tmp" / f"1-{digit * 16}" for digit in "ab")
    for path in (fresh, stale):
        path.write_bytes(b"half a cubin")
    os.utime(stale, (0, 0))
    DiskCache(cache_dir).clear()
    assert fresh.exists()
    assert not stale.exists()

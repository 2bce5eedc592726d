"""Tests the disk cache: valid entries, corrupt entries, and I/O errors."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from jitattn.cache import disk as cache
from jitattn.cache import files, location
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry, Metadata, cache_key, is_cubin_for, sha256
from jitattn.cache.store import Bad
from jitattn.jit import build
from tests.cpu.specs import combine_spec, forward_spec

POSIX = pytest.mark.skipif(not files.HAS_OWNERS, reason="needs POSIX owners and modes")


@pytest.fixture
def entry(cache_dir: Path) -> tuple[DiskCache, Metadata, bytes]:
    """A cache with one real entry."""
    built = build.build(combine_spec())
    assert built.origin == "compiled"
    return DiskCache(cache_dir), built.metadata, built.cubin


def paths(disk: DiskCache, key: str) -> tuple[Path, Path]:
    folder = disk.root / "v1" / key[:2]
    return folder / f"{key[2:]}.cubin", folder / f"{key[2:]}.json"


def test_roundtrip(entry: tuple[DiskCache, Metadata, bytes]) -> None:
    disk, metadata, cubin = entry
    found = disk.read(metadata.key, "sm_80")
    assert found is not None
    assert found.cubin == cubin
    assert found.metadata == metadata
    assert [one.key for one in disk.entries()] == [metadata.key]


def test_key_depends_on_every_ingredient() -> None:
    base = (combine_spec().to_dict(), "digest", "header", ("-a", "-b"), "nvrtc 12.9.86")
    kernels = [
        base,
        (combine_spec("sm_86").to_dict(), *base[1:]),
        (combine_spec(head_dim_v=32).to_dict(), *base[1:]),
        (base[0], "other", *base[2:]),
        (*base[:2], "other", *base[3:]),
        (*base[:3], ("-a",), base[4]),
        (*base[:3], ("-a-b",), base[4]),
    ]
    keys = [cache_key(*kernel) for kernel in kernels]
    assert len({key[:40] for key in keys}) == len({key[40:] for key in keys}) == len(keys)
    other_compiler = cache_key(*base[:4], "nvrtc 13.0.88")
    assert other_compiler[:40] == keys[0][:40]
    assert other_compiler[40:] != keys[0][40:]
    assert cache_key(*base) == keys[0]


def test_metadata_holds_every_ingredient_of_the_key() -> None:
    metadata = build.build(combine_spec()).metadata
    assert metadata.key_again() == metadata.key == build.key_of(combine_spec())


def damaged(content: bytes, offsets: int = 64) -> list[bytes]:
    """Every kind of damage: cut, emptied, zeroed, extended, one bit flipped at many places."""
    flips = []
    for index in range(offsets):
        flipped = bytearray(content)
        flipped[index * (len(content) - 1) // (offsets - 1)] ^= 1 << index % 8
        flips.append(bytes(flipped))
    cuts = [b"", content[:1], content[: len(content) // 2], content[:-1]]
    return [*cuts, bytes(len(content)), content + b"\0", *flips]


def test_damaged_cubin_is_never_believed(entry: tuple[DiskCache, Metadata, bytes]) -> None:
    disk, metadata, cubin = entry
    path = paths(disk, metadata.key)[0]
    for one in damaged(cubin):
        path.write_bytes(one)
        assert isinstance(disk.look(metadata.key, "sm_80"), Bad)
    path.write_bytes(cubin)
    assert isinstance(disk.look(metadata.key, "sm_80"), Entry)


def test_damaged_metadata_never_gives_another_cubin(
    entry: tuple[DiskCache, Metadata, bytes],
) -> None:
    disk, metadata, cubin = entry
    path = paths(disk, metadata.key)[1]
    text = path.read_bytes()
    believed = 0
    for one in damaged(text):
        path.write_bytes(one)
        found = disk.look(metadata.key, "sm_80")
        # A flip in a figure that is only reported may leave the entry usable: with the same bytes.
        assert isinstance(found, Bad) or found.cubin == cubin
        believed += isinstance(found, Entry)
    assert believed < 64
    path.write_bytes(text)
    assert isinstance(disk.look(metadata.key, "sm_80"), Entry)


def test_swapped_cubins_are_not_believed(entry: tuple[DiskCache, Metadata, bytes]) -> None:
    disk, metadata, _ = entry
    other = build.build(combine_spec(head_dim_v=32)).metadata
    one_path, other_path = (paths(disk, key)[0] for key in (metadata.key, other.key))
    one, two = one_path.read_bytes(), other_path.read_bytes()
    assert one != two
    one_path.write_bytes(two)
    other_path.write_bytes(one)
    for key in (metadata.key, other.key):
        assert isinstance(disk.look(key, "sm_80"), Bad)


def test_bad_entry_is_set_aside(entry: tuple[DiskCache, Metadata, bytes]) -> None:
    disk, metadata, cubin = entry
    for path in paths(disk, metadata.key):
        path.write_bytes(path.read_bytes()[:-1])
    assert disk.read(metadata.key, "sm_80", is_writable=False) is None
    assert all(path.exists() for path in paths(disk, metadata.key))
    assert disk.read(metadata.key, "sm_80") is None
    assert not any(path.exists() for path in paths(disk, metadata.key))
    aside = sorted(path.suffix for path in (disk.root / "v1" / "bad").iterdir())
    assert aside == [".cubin", ".json"]
    disk.write(Entry(cubin, metadata))
    assert disk.read(metadata.key, "sm_80") is not None


def test_good_entry_that_replaced_a_bad_one_stays(
    entry: tuple[DiskCache, Metadata, bytes],
) -> None:
    disk, metadata, cubin = entry
    paths(disk, metadata.key)[0].write_bytes(b"bad")
    bad = disk.look(metadata.key, "sm_80")
    assert isinstance(bad, Bad)
    disk.write(Entry(cubin, metadata))  # another process was faster
    disk.set_aside(bad)
    assert disk.look(metadata.key, "sm_80") is not None


@pytest.mark.parametrize(
    "text", [b"[]", b"null", b"{", b'{"key": 1}', b"[" * 100_000, b"\xff\xfe", b"NaN"]
)
def test_strange_json_is_a_miss(entry: tuple[DiskCache, Metadata, bytes], text: bytes) -> None:
    disk, metadata, _ = entry
    paths(disk, metadata.key)[1].write_bytes(text)
    assert disk.read(metadata.key, "sm_80") is None
    assert list(disk.entries()) == []


def test_entry_under_another_name_is_a_miss(entry: tuple[DiskCache, Metadata, bytes]) -> None:
    disk, metadata, _ = entry
    other = "ab" * 32
    for old, new in zip(paths(disk, metadata.key), paths(disk, other), strict=True):
        new.parent.mkdir(exist_ok=True)
        os.replace(old, new)
    assert disk.read(other, "sm_80") is None
    assert list(disk.entries()) == []


def test_cubin_of_another_architecture_is_a_miss(
    entry: tuple[DiskCache, Metadata, bytes],
) -> None:
    disk, metadata, cubin = entry
    assert is_cubin_for(cubin, "sm_80")
    assert not is_cubin_for(cubin, "sm_90")
    assert disk.read(metadata.key, "sm_90") is None
    disk.write(Entry(cubin, replace(metadata, arch="sm_90", key="cd" * 32)))  # forged metadata
    assert disk.read("cd" * 32, "sm_90") is None


@POSIX
@pytest.mark.parametrize("kind", ["writable", "symlink", "directory", "fifo"])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_private_file_is_a_miss_and_makes_way(
    entry: tuple[DiskCache, Metadata, bytes], kind: str, which: int, tmp_path: Path
) -> None:
    disk, metadata, _ = entry
    path = paths(disk, metadata.key)[which]
    if kind == "writable":
        path.chmod(0o666)
    else:
        path.rename(tmp_path / "elsewhere")
        if kind == "symlink":
            path.symlink_to(tmp_path / "elsewhere")
        elif kind == "directory":
            path.mkdir()
        else:
            os.mkfifo(path)
    assert disk.read(metadata.key, "sm_80") is None
    build.clear_memory()
    assert build.build(combine_spec()).origin == "compiled"
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"


@POSIX
def test_foreign_owner_is_a_miss(
    entry: tuple[DiskCache, Metadata, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, metadata, _ = entry
    if os.geteuid() == 0:
        os.chown(paths(disk, metadata.key)[0], 4711, -1)
    else:
        monkeypatch.setattr(files.os, "geteuid", lambda: 4711)
    assert disk.read(metadata.key, "sm_80") is None


@POSIX
def test_modes_and_tag(entry: tuple[DiskCache, Metadata, bytes]) -> None:
    disk, metadata, _ = entry
    for path in paths(disk, metadata.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(disk.root.stat().st_mode) == 0o700
    assert (disk.root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172")
    assert list((disk.root / "v1" / "tmp").iterdir()) == []


@POSIX
def test_directory_that_others_can_write_is_not_used(cache_dir: Path) -> None:
    (cache_dir / "v1").mkdir(parents=True)
    (cache_dir / "v1").chmod(0o777)
    assert build.build(combine_spec()).origin == "compiled"
    assert list(DiskCache(cache_dir).entries()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_kernel_in_memory(
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    code: int,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, call, fail)
    with caplog.at_level(logging.WARNING, "jitattn"):
        built = [build.build(combine_spec(head_dim_v=dim)) for dim in (16, 32)]
    assert [one.origin for one in built] == ["compiled", "compiled"]
    assert len(caplog.records) == 1
    assert "kept in memory" in caplog.text
    monkeypatch.undo()
    assert [path for path in cache_dir.rglob("*") if path.suffix in (".cubin", ".json")] == []
    assert list((cache_dir / "v1" / "tmp").iterdir()) == []


def test_unusable_directory_keeps_the_kernel_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "jitattn"):
        assert build.build(combine_spec()).origin == "compiled"
    assert len(caplog.records) == 1
    assert build.build(combine_spec()).origin == "compiled"
    assert build.stats().memory_hits == 1


@POSIX
def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(*_: object, **__: object) -> str:
        raise RuntimeError("no home")

    monkeypatch.delenv("JITATTN_CACHE_DIR")
    monkeypatch.setattr(location.platformdirs, "user_cache_dir", no_home)
    monkeypatch.setattr(location.tempfile, "gettempdir", lambda: str(tmp_path))
    disk = cache.user_cache()
    assert disk is not None
    assert disk.root == tmp_path / f"jitattn-{os.geteuid()}"
    assert stat.S_IMODE(disk.root.stat().st_mode) == 0o700
    disk.root.chmod(0o777)  # someone else may have put something there
    location._found.cache_clear()  # as a new process
    assert cache.user_cache() is None


@pytest.mark.usefixtures("windows")
def test_windows_branch(cache_dir: Path) -> None:
    assert build.build(combine_spec()).origin == "compiled"
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"


def test_clear_deletes_entries_and_nothing_else(
    entry: tuple[DiskCache, Metadata, bytes],
) -> None:
    disk, metadata, cubin = entry
    disk.write(Entry(cubin, replace(metadata, key="ef" * 32)))
    mine = [disk.root / "notes.txt", disk.root / "v1" / "ab.json"]
    for path in mine:
        path.write_text("not of the cache")
    assert disk.clear() == 2
    assert list(disk.entries()) == []
    assert all(path.exists() for path in mine)


def test_checksum_and_size_are_recorded(entry: tuple[DiskCache, Metadata, bytes]) -> None:
    disk, metadata, cubin = entry
    record = json.loads(paths(disk, metadata.key)[1].read_text())
    assert record["sha256"] == sha256(cubin)
    assert record["bytes"] == len(cubin)
    assert record["spec"] == combine_spec().to_dict()


def test_forward_and_merge_have_keys_of_their_own() -> None:
    assert build.key_of(forward_spec()) != build.key_of(combine_spec())

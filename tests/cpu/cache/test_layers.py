"""Tests read-only cache layers: search order, kernels of any compiler, no writes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from jitattn.cache import disk as cache
from jitattn.cache import files
from jitattn.cache.archive import export, import_archive
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry
from jitattn.cache.files import HAS_OWNERS
from jitattn.cache.store import Bad
from jitattn.errors import CacheMissError, CompileError
from jitattn.jit import build, compilers, layers
from tests.cpu.specs import combine_spec, fake_entry

POSIX = pytest.mark.skipif(not HAS_OWNERS, reason="needs POSIX owners and modes")
BOTH = pytest.mark.skipif(len(compilers.installed()) < 2, reason="needs NVRTC 12 and 13")


def made_elsewhere(root: Path, monkeypatch: pytest.MonkeyPatch, major: int | None = None) -> str:
    """Put the kernel of `combine_spec()` into another cache directory; its key."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("JITATTN_CACHE_DIR", str(root))
        if major is not None:
            elsewhere.setenv("JITATTN_NVRTC", str(major))
        build.clear_memory()
        key = build.build(combine_spec()).key
    build.clear_memory()
    return key


@pytest.fixture
def layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "layer"
    made_elsewhere(root, monkeypatch)
    monkeypatch.setenv("JITATTN_CACHE_PATH", str(root))
    return root


def test_found_and_never_written(layer: Path, cache_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in layer.rglob("*")}
    assert build.build(combine_spec()).origin == "read-only"
    assert build.build(combine_spec(head_dim_v=32)).origin == "compiled"
    assert {path: path.stat().st_mtime_ns for path in layer.rglob("*")} == before
    assert len(DiskCache(cache_dir).keys()) == 1


def test_users_own_comes_first(
    layer: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JITATTN_CACHE_PATH")
    build.build(combine_spec())
    monkeypatch.setenv("JITATTN_CACHE_PATH", str(layer))
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"


def test_several_directories_in_order(
    layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.pathsep.join([str(tmp_path / "missing"), "", str(layer), str(tmp_path / "other")])
    monkeypatch.setenv("JITATTN_CACHE_PATH", path)
    roots = [store.root for store in layers.layers(None)]
    assert roots[:3] == [tmp_path / "missing", layer, tmp_path / "other"]
    assert build.build(combine_spec()).origin == "read-only"


@pytest.mark.parametrize(("mode", "origin"), [("ro", "read-only"), ("off", "compiled")])
def test_modes(layer: Path, monkeypatch: pytest.MonkeyPatch, mode: str, origin: str) -> None:
    monkeypatch.setenv("JITATTN_CACHE", mode)
    assert build.build(combine_spec()).origin == origin


@BOTH
def test_kernels_of_another_compiler_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "layer"
    made_elsewhere(root, monkeypatch, major=12)
    monkeypatch.setenv("JITATTN_CACHE_PATH", str(root))
    monkeypatch.setenv("JITATTN_NVRTC", "13")
    built = build.build(combine_spec())
    assert built.origin == "read-only"
    assert built.metadata.toolchain.startswith("nvrtc 12.")


@BOTH
def test_of_two_compilers_the_newest_that_the_driver_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "layer"
    keys = [made_elsewhere(root, monkeypatch, major) for major in (12, 13)]
    monkeypatch.setenv("JITATTN_CACHE_PATH", str(root))
    for driver, expected in ((13, keys[1]), (12, keys[0]), (None, keys[1])):
        monkeypatch.setattr(compilers, "driver_major", lambda driver=driver: driver)
        build.clear_memory()
        assert build.build(combine_spec()).key == expected
    monkeypatch.setattr(compilers, "driver_major", lambda: 11)  # loads neither
    build.clear_memory()
    assert layers.find(keys[0], "sm_80", None) is None


def test_no_compiler_at_all(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise CompileError("no NVRTC is installed")

    monkeypatch.setattr(compilers, "chosen", none)
    assert build.build(combine_spec()).origin == "read-only"
    with pytest.raises(CompileError, match="no NVRTC"):
        build.build(combine_spec(head_dim_v=32))
    # Nor is it needed for what the user's own cache holds.
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(layer))
    monkeypatch.delenv("JITATTN_CACHE_PATH")
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"


def test_bad_entry_is_passed_over_and_left_there(
    layer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = layer.glob("v1/*/*.cubin")
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "jitattn"):
        assert build.build(combine_spec()).origin == "compiled"
    assert "failed its checks" in caplog.text
    assert path.exists()


@POSIX
@pytest.mark.parametrize("which", ["", "v1"])
def test_directory_that_others_can_write_is_not_used(layer: Path, which: str) -> None:
    (layer / which).chmod(0o777)
    assert build.build(combine_spec()).origin == "compiled"


@pytest.mark.skipif(not HAS_OWNERS or os.geteuid() != 0, reason="needs root, to act as other users")
def test_owners(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator may own all of it; a part that is somebody else's is refused."""
    everything = (layer, *layer.rglob("*"))
    for path in everything:
        os.chown(path, 4711, 4711)
    assert build.build(combine_spec()).origin == "read-only"
    (cubin,) = layer.glob("v1/*/*.cubin")
    os.chown(cubin, 4712, 4711)
    build.clear_memory()
    files._warned.clear()
    monkeypatch.setenv("JITATTN_CACHE", "ro")
    assert build.build(combine_spec()).origin == "compiled"


def test_installed_package(layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JITATTN_CACHE_PATH")
    layer.rename(tmp_path / layers.PREBUILT_PACKAGE)
    monkeypatch.setattr(layers.sysconfig, "get_path", lambda _: str(tmp_path))
    assert build.build(combine_spec()).origin == "read-only"


def test_imported_archive(tmp_path: Path, cache_dir: Path) -> None:
    built = build.build(combine_spec())
    archive = tmp_path / "kernels.zip"
    export(archive, [Entry(built.cubin, built.metadata)])
    user = cache.user_cache()
    assert user is not None
    user.clear()
    import_archive(archive, user)
    build.clear_memory()
    assert build.build(combine_spec()).origin == "read-only"
    assert user.keys() == []


def test_layer_of_many_kernels_is_searched_by_name(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "layer")
    entries = [fake_entry(number, toolchain=f"nvrtc 13.0.{number}") for number in range(40)]
    for entry in entries:
        disk.write(entry)
    other = fake_entry(7, toolchain="nvrtc 13.2.1")
    disk.write(other)
    found = list(disk.look_for_kernel(other.metadata.key, "sm_80"))
    assert found == [other, entries[7]]


def test_one_of_many_compilers_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others only what made them; of those that the driver cannot load, no more either."""
    disk = DiskCache(tmp_path / "layer")
    entries = []
    for number in range(40):
        entry = fake_entry(7, 65536, toolchain=f"nvrtc {12 + number % 2}.{number}.1")
        disk.write(entry)
        entries.append(entry)
    real, read = files.read, []

    def counted(path: object, *arguments: object) -> files.Content:
        read.append(str(path))
        return real(path, *arguments)

    monkeypatch.setattr(files, "read", counted)
    monkeypatch.setenv("JITATTN_CACHE_PATH", str(disk.root))
    monkeypatch.setattr(compilers, "driver_major", lambda: 12)
    found = layers.find(entries[0].metadata.key, "sm_80", None)
    assert found == entries[38]
    assert sum(path.endswith(".cubin") for path in read) == 1
    read.clear()
    assert next(disk.look_for_kernel(entries[0].metadata.key, "sm_80")) == entries[39]
    assert sum(path.endswith(".cubin") for path in read) == 1


def test_damaged_entry_does_not_hide_good_ones(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "layer")
    entries = [fake_entry(7, toolchain=f"nvrtc 13.0.{number}") for number in range(3)]
    for entry in entries:
        disk.write(entry)
    disk.paths(entries[2].metadata.key)[0].write_bytes(b"damaged")
    disk.paths(entries[1].metadata.key)[1].write_bytes(b"damaged")
    found = list(disk.look_for_kernel(entries[0].metadata.key, "sm_80"))
    assert [one.key for one in (found[0], found[2]) if isinstance(one, Bad)] == [
        entries[2].metadata.key,
        entries[1].metadata.key,
    ]
    assert found[1] == entries[0]


def test_forbidden_compile_names_spec_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITATTN_NO_COMPILE", "1")
    with pytest.raises(CacheMissError, match="jitattn-cache prebuild --arch 80") as caught:
        build.build(combine_spec())
    assert combine_spec().to_key() in str(caught.value)
    monkeypatch.delenv("JITATTN_NO_COMPILE")
    build.build(combine_spec())
    monkeypatch.setenv("JITATTN_NO_COMPILE", "1")
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"

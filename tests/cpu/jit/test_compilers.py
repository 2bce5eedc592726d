"""Tests the choice of NVRTC version."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitattn.cache import memo
from jitattn.cache.files import HAS_OWNERS
from jitattn.errors import CompileError
from jitattn.jit import compilers, nvrtc
from tests.cpu.processes import FORK, Child


@pytest.fixture
def no_memo() -> Iterator[None]:
    compilers._choose.cache_clear()
    yield
    compilers._choose.cache_clear()


@pytest.mark.usefixtures("no_memo")
@pytest.mark.parametrize(
    ("driver", "majors", "expected"),
    [(None, (12, 13), 13), (13, (12, 13), 13), (12, (12, 13), 12), (13, (12,), 12)],
)
def test_choice_by_driver(
    monkeypatch: pytest.MonkeyPatch, driver: int | None, majors: tuple[int, ...], expected: int
) -> None:
    found = {
        major: compilers.Toolchain(version=(major, 1, 2), library=Path("x"), builtins=())
        for major in majors
    }
    monkeypatch.setattr(compilers, "installed", lambda: found)
    monkeypatch.setattr(compilers, "driver_major", lambda: driver)
    assert compilers.chosen() is found[expected]
    assert str(compilers.chosen()) == f"nvrtc {expected}.1.2"


@pytest.mark.usefixtures("no_memo")
@pytest.mark.parametrize(
    ("driver", "majors", "text"),
    [(12, (13,), r"\[cu12\]"), (13, (), r"\[cu13\]")],
)
def test_no_usable_compiler(
    monkeypatch: pytest.MonkeyPatch, driver: int, majors: tuple[int, ...], text: str
) -> None:
    found = {
        major: compilers.Toolchain(version=(major, 0), library=Path("x"), builtins=())
        for major in majors
    }
    monkeypatch.setattr(compilers, "installed", lambda: found)
    monkeypatch.setattr(compilers, "driver_major", lambda: driver)
    with pytest.raises(CompileError, match=text):
        compilers.chosen()


@pytest.mark.usefixtures("no_memo")
@pytest.mark.parametrize("major", [12, 13])
def test_override(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setenv("JITATTN_NVRTC", str(major))
    if major in compilers.installed():
        assert compilers.chosen().version[0] == major
    else:
        with pytest.raises(CompileError, match=rf"cu{major}"):
            compilers.chosen()


class Wheel:
    """An installed distribution, with its files in a folder."""

    def __init__(self, folder: Path, version: object = "13.0.88") -> None:
        self.folder = folder
        self._version = version

    @property
    def version(self) -> object:
        if isinstance(self._version, Exception):
            raise self._version
        return self._version

    def locate_file(self, path: str) -> Path:
        return self.folder / path


def install(monkeypatch: pytest.MonkeyPatch, wheel: Wheel) -> Path:
    """Make a wheel of NVRTC 13 the only one; its library, which is made."""
    library = wheel.folder / compilers._LINUX[13][1]
    library.parent.mkdir(parents=True)
    library.touch()

    def distribution(name: str) -> Wheel:
        if name == compilers._LINUX[13][0]:
            return wheel
        raise compilers.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compilers.importlib.metadata, "distribution", distribution)
    return library


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ELOOP])
def test_library_that_cannot_be_looked_at_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Opening it says what is wrong; to say that none is installed would lead nowhere."""
    library, real = install(monkeypatch, Wheel(tmp_path)), os.stat

    def stat(path: object, *arguments: object, **options: object) -> os.stat_result:
        if str(path) == str(library):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as closed:
        closed.setattr(compilers.os, "stat", stat)
        found = compilers.installed("linux")
    assert found[13].library == library
    with pytest.raises(CompileError, match="could not be opened"):
        nvrtc.supported_archs(found[13])
    library.unlink()
    assert compilers.installed("linux") == {}


@FORK
@pytest.mark.skipif(not HAS_OWNERS or os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
def test_folder_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Wheel(tmp_path / "packages"))
    (tmp_path / "packages").chmod(0o700)

    def act() -> list[str]:
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)
        return [str(one) for one in compilers.installed("linux").values()]

    assert Child(act).result() == ["nvrtc 13.0.88"]


@pytest.mark.parametrize(
    "version",
    [None, "", "x", "٣٢.٣", "12.9.86", PermissionError(13, "no"), KeyError("Version"),
     UnicodeDecodeError("utf-8", b"", 0, 1, "")],
    ids=str,
)  # fmt: skip
def test_wheel_without_a_version_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: object
) -> None:
    install(monkeypatch, Wheel(tmp_path, version))
    assert compilers.installed("linux") == {}


def test_windows_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        version = "12.9.86"

        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    folder = tmp_path / "nvidia" / "cuda_nvrtc" / "bin"
    folder.mkdir(parents=True)
    for name in ("nvrtc64_120_0.dll", "nvrtc-builtins64_129.dll", "other.dll"):
        (folder / name).touch()

    def distribution(name: str) -> Distribution:
        if name == "nvidia-cuda-nvrtc-cu12":
            return Distribution()
        raise compilers.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compilers.importlib.metadata, "distribution", distribution)
    found = compilers.installed("win32")
    assert list(found) == [12]
    assert found[12].library == folder / "nvrtc64_120_0.dll"
    assert found[12].builtins == (folder / "nvrtc-builtins64_129.dll",)


def test_remembered_until_something_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    library = packages / "libnvrtc.so"
    library.touch()
    found = {13: compilers.Toolchain(version=(13, 1, 2), library=library, builtins=(library,))}
    calls = []
    monkeypatch.setattr(compilers, "installed", lambda: calls.append(1) or found)
    monkeypatch.setattr(compilers.sys, "path", [str(packages)])
    assert compilers._remembered() == found
    memo._loaded.clear()  # as a new process
    assert compilers._remembered() == found
    assert len(calls) == 1
    (packages / "another.dist-info").mkdir()
    memo._loaded.clear()
    assert compilers._remembered() == found
    assert len(calls) == 2


@pytest.mark.parametrize("entry", [Path("/x"), b"/x", 7, None, "", "a\0b", "\udcff"], ids=repr)
def test_strange_entry_of_sys_path_hides_no_compiler(
    monkeypatch: pytest.MonkeyPatch, entry: object
) -> None:
    found = compilers.installed()
    monkeypatch.setattr(compilers.sys, "path", [entry, *compilers.sys.path])
    assert compilers.installed() == found
    assert compilers._remembered() == found


@pytest.mark.parametrize("fact", [["x", []], [[], "x"], [[], [["a", 1, 2]]], 7])
def test_damaged_memo_is_passed_over(cache_dir: Path, fact: object) -> None:
    memo.remember("other", [], 1)  # makes the file
    (cache_dir / "v1" / "memo.json").write_text(f'{{"nvrtc in {compilers.sys.prefix}": {fact!r}}}')
    memo._loaded.clear()
    assert compilers._remembered() == compilers.installed()


def test_newer_cuda_than_the_driver_is_not_loadable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "driver_major", lambda: 12)
    assert compilers.is_loadable("nvrtc 12.9.86")
    assert not compilers.is_loadable("nvrtc 13.0.88")
    assert not compilers.is_loadable("")
    monkeypatch.setattr(compilers, "driver_major", lambda: None)
    assert compilers.is_loadable("nvrtc 13.0.88")

"""Which NVRTC compiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jitattn.errors import CompileError
from jitattn.jit import compilers, memo


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
    [(12, (13,), r"jitattn\[cu12\]"), (13, (), r"jitattn\[cu13\]")],
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

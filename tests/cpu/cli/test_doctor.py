"""Tests the findings of `doctor`, and that it always finishes."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

from jitattn.cache import files
from jitattn.cache.disk import DiskCache
from jitattn.cli import health as doctor
from jitattn.jit import build, compilers
from jitattn.spec import install
from tests.cpu.commands import run
from tests.cpu.specs import combine_spec

#: The module, which has the name of its command.
command = importlib.import_module("jitattn.cli.doctor")


@pytest.fixture
def filled(cache_dir: Path) -> DiskCache:
    """A cache with one kernel."""
    build.build(combine_spec())
    return DiskCache(cache_dir)


def findings(area: str) -> list[tuple[str, str, str]]:
    return [(one.status, one.found, one.advice) for one in doctor.examine() if one.area == area]


def test_doctor(filled: DiskCache) -> None:
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert {one["area"] for one in found} >= {"python", "torch", "nvrtc", "driver", "cache"}
    assert any(str(compilers.chosen()) in one["found"] for one in found)
    assert any(str(filled.root) in one["found"] for one in found)
    assert done.exit_code == any(one["status"] == "bad" for one in found)
    assert str(filled.root) in run("doctor").stdout


def test_doctor_knows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITATTN_CASHE", "ro")
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "soon")
    found = findings("environment")
    assert any(status == "warn" and "JITATTN_CACHE" in advice for status, _, advice in found)
    assert any(status == "bad" and "LOCK_TIMEOUT='soon'" in text for status, text, _ in found)
    assert run("doctor").exit_code == 1


@pytest.mark.skipif(not files.HAS_OWNERS, reason="needs POSIX owners and modes")
def test_doctor_knows_who_can_write(filled: DiskCache) -> None:
    filled.store.chmod(0o777)
    bad = [text for status, text, _ in findings("cache") if status == "bad"]
    assert bad
    assert "others may write to it" in bad[0]
    filled.store.chmod(0o700)


def test_doctor_knows_mixed_installations(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"cupy-cuda12x": "14.0", "cupy-cuda13x": "14.2", "torch": "2.11.0+cu130"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(compilers, "driver_major", lambda: 12)
    found = findings("cupy")
    assert any(status == "bad" and "several CuPy" in text for status, text, _ in found)
    del versions["cupy-cuda12x"]
    found = findings("cupy")
    assert any(status == "bad" and "the driver knows 12" in text for status, text, _ in found)
    versions.clear()
    (first, *_) = findings("cupy")
    assert first[0] == "bad"
    assert "cu12" in first[2]


def test_doctor_finishes_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict:
        raise OSError("broken")

    monkeypatch.setattr(compilers, "installed", broken)
    assert any("broken" in text for _, text, _ in findings("nvrtc"))
    assert findings("cache")


def test_doctor_says_why_a_compiler_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "driver_major", lambda: 13)
    compilers._choose.cache_clear()
    assert any(
        "(compiles: the newest for a driver of CUDA 13)" in one for _, one, _ in findings("nvrtc")
    )
    monkeypatch.setenv("JITATTN_NVRTC", "12")
    found = [text for _, text, _ in findings("nvrtc") if "compiles:" in text]
    compilers._choose.cache_clear()
    (text,) = found
    assert text.startswith("nvrtc 12.")
    assert text.endswith("(compiles: JITATTN_NVRTC=12)")


def test_doctor_sees_what_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path, text in (("file", "it is no directory"), ("file/below", "cannot be made")):
        monkeypatch.setenv("JITATTN_CACHE_DIR", str(tmp_path / path))
        bad = [(found, advice) for status, found, advice in findings("cache") if status == "bad"]
        assert any(text in found for found, _ in bad)
        for _, advice in bad:  # no chmod: that would not help
            assert advice.startswith(f"{tmp_path / 'file'} is a file: move it away, or set")
    assert run("doctor").exit_code == 1


def test_doctor_wants_a_directory_of_its_own(filled: DiskCache) -> None:
    assert not any("other things" in text for _, text, _ in findings("cache"))
    (filled.root / "letter.txt").write_text("dear")
    assert any(
        status == "warn" and "letter.txt" in text and "of its own" in advice
        for status, text, advice in findings("cache")
    )


def test_doctor_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITATTN_CACHE", "ro")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cupy"))
    assert any("can be made" in text for _, text, _ in findings("cache"))
    assert findings("cupy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not files.HAS_OWNERS, reason="needs POSIX owners and modes")
def test_doctor_knows_read_only_directories(
    filled: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(filled.root)
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("JITATTN_CACHE_PATH", os.pathsep.join((str(link), str(tmp_path / "gone"))))
    found = findings("read-only")
    assert ("ok", f"{link}: 1 kernel", "") in found
    assert any(status == "warn" and "gone holds no kernels" in text for status, text, _ in found)
    filled.root.chmod(0o770)  # the root counts as much as what is in it
    found = findings("read-only")
    assert any(status == "bad" and "others may write to it" in text for status, text, _ in found)
    assert not any("1 kernel" in text for _, text, _ in found)
    filled.root.chmod(0o700)


def test_doctor_says_that_the_cache_is_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JITATTN_CACHE_DIR")
    monkeypatch.setattr(doctor, "user_cache", lambda **_: DiskCache(tmp_path / "jitattn-0"))
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))
    status, text, advice = findings("cache")[0]
    assert status == "warn"
    assert "among temporary files" in text
    assert "JITATTN_CACHE_DIR" in advice


def test_doctor_knows_network_filesystems(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir.mkdir(mode=0o700)
    monkeypatch.setattr(doctor, "_filesystem", lambda _: "nfs4")
    assert any("network filesystem (nfs4)" in text for _, text, _ in findings("cache"))


def test_the_longest_mount_point_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path.resolve() / "a b"
    inner.mkdir()
    mounts = f"root / ext4 rw 0 0\nserver {str(inner).replace(' ', chr(92) + '040')} nfs4 rw 0 0\n"
    monkeypatch.setattr(doctor.Path, "read_text", lambda _: mounts)
    assert doctor._filesystem(inner / "cache") == "nfs4"
    assert doctor._filesystem(tmp_path) == "ext4"


def test_torch_is_asked_only_in_full() -> None:
    assert not any(one.area == "torch (full)" for one in doctor.examine())
    full = [one for one in doctor.examine(full=True) if one.area == "torch (full)"]
    assert any("can be imported" in one.found for one in full)
    assert json.loads(run("doctor", "--full", "--json").stdout)[-1]["area"] == "torch (full)"


@pytest.mark.parametrize(
    ("answer", "driver", "text"),
    [
        ("import os; os.abort()", 13, "cannot be imported: status -6"),
        ("raise ImportError('libcudart.so is missing')", 13, "libcudart.so is missing"),
        ('print(\'["2.11", "13.0", false]\')', 12, "needs CUDA 13.0, the driver knows 12"),
        ('print(\'["2.11", "12.9", false]\')', 12, "no usable GPU"),
    ],
)
@pytest.mark.skipif(not files.HAS_OWNERS, reason="statuses of POSIX")
def test_a_torch_that_is_of_no_use_is_bad(
    monkeypatch: pytest.MonkeyPatch, answer: str, driver: int, text: str
) -> None:
    monkeypatch.setattr(doctor, "_ASK_TORCH", answer)
    monkeypatch.setattr(compilers, "driver_major", lambda: driver)
    found = [one for one in doctor._asked_torch() if one[0] == "bad"]
    assert len(found) == 1
    assert text in found[0][1]


def test_doctor_sums_up(filled: DiskCache) -> None:
    done = run("doctor")
    found = json.loads(run("doctor", "--json").stdout)
    good, warnings, bad = (
        sum(one["status"] == status for one in found) for status in ("ok", "warn", "bad")
    )
    words = f"{warnings} warning{'' if warnings == 1 else 's'}"
    assert done.stdout.splitlines()[-1].startswith(f"{good} ok, {words}, {bad} problem")
    assert "\x1b" not in done.stdout  # colours are for terminals


def test_doctor_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(command.sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert command._coloured("bad", "BAD") == "\x1b[31m\x1b[1mBAD\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert command._coloured("bad", "BAD") == "BAD"


def test_doctor_says_what_to_do_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "driver_major", lambda: None)
    ((status, text, advice),) = findings("driver")
    assert (status, text) == ("warn", "no CUDA driver: compiling works, launching does not")
    assert "install its driver" in advice
    assert "CPU tensors and prebuild work" in advice


def test_doctor_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "IS_MACOS", True)
    monkeypatch.setattr(compilers, "driver_major", lambda: None)
    monkeypatch.setattr(compilers, "installed", dict)
    assert findings("driver") == [("warn", "macOS has no CUDA", install.NO_MACOS)]
    assert findings("nvrtc")[0][2] == install.NO_MACOS

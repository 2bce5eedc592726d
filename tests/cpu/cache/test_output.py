"""Tests files written by commands: atomic, and only to new names or regular files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jitattn.cache import files, output
from jitattn.cache.archive import export
from jitattn.cache.disk import DiskCache
from jitattn.errors import CacheError
from tests.cpu.commands import result, run
from tests.cpu.specs import fake_entry

POSIX = pytest.mark.skipif(not files.HAS_OWNERS, reason="needs POSIX links and FIFOs")
ENTRY = fake_entry(1)
COMMANDS = ("export", "extract")


@pytest.fixture
def disk(cache_dir: Path) -> DiskCache:
    """A cache with one entry."""
    disk = DiskCache(cache_dir)
    assert disk.write(ENTRY)
    return disk


def arguments(command: str, target: str) -> tuple[str, ...]:
    if command == "export":
        return ("export", target)
    return ("extract", ENTRY.metadata.key, "-o", target)


@pytest.mark.parametrize("command", COMMANDS)
def test_name_that_is_taken(disk: DiskCache, tmp_path: Path, command: str) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    done = run(*arguments(command, str(target)))
    assert done.exit_code == 1
    assert "is there already: add -y" in done.stderr
    assert target.read_text() == "mine"
    assert run(*arguments(command, str(target)), "-y").exit_code == 0
    assert len(target.read_bytes()) >= ENTRY.metadata.bytes


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path)[-100:])


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # /dev/null
    except PermissionError:
        pytest.skip("needs the right to make devices")


def make_link(path: Path) -> None:
    (path.parent / "linked").write_text("mine")
    path.symlink_to(path.parent / "linked")


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def make_directory(path: Path) -> None:
    path.mkdir()


MAKERS = (make_fifo, make_socket, make_device, make_link, make_dangling_link, make_directory)


@POSIX
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("make", MAKERS)
def test_what_is_no_regular_file_stays(
    disk: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, make: object
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)  # the name of a socket is short
    make(Path("target"))
    before = sorted((path.name, path.lstat().st_mode) for path in folder.iterdir())
    for more in ((), ("-y",)):
        done = run(*arguments(command, "target"), *more)
        assert done.exit_code == 1
        assert any(text in done.stderr for text in ("no regular file", "link", "is a directory"))
    assert sorted((path.name, path.lstat().st_mode) for path in folder.iterdir()) == before
    linked = folder / "linked"
    assert not linked.exists() or linked.read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("target", ["/", ".", "", "..", "./", "folder/", "missing/file", "a" * 300])
def test_strange_names(
    disk: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, target: str
) -> None:
    work = tmp_path / "work"
    (work / "folder").mkdir(parents=True)
    monkeypatch.chdir(work)
    for more in ((), ("-y",)):
        done = run(*arguments(command, target), *more)
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit)
        assert "is a directory" in done.stderr or "cannot be written" in done.stderr
    assert [path.name for path in work.iterdir()] == ["folder"]


def test_null_byte_in_a_name(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="null byte"):
        export(Path(f"{tmp_path}/a\0b"), [ENTRY])


def test_longest_name(disk: DiskCache, tmp_path: Path) -> None:
    target = tmp_path / ("a" * 251 + ".zip")
    assert result("export", str(target))["kernels"] == 1
    assert target.is_file()


def test_name_that_is_taken_meanwhile(tmp_path: Path) -> None:
    """It was free when it was looked at; whoever came later keeps what was written there."""
    target = tmp_path / "target"

    def pieces():
        yield b"one"
        target.write_text("mine")
        yield b"two"

    with pytest.raises(CacheError, match="is there already"):
        output.write(target, pieces())
    assert target.read_text() == "mine"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_filesystem_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    output.write(tmp_path / "target", [b"one", b"two"])
    assert (tmp_path / "target").read_bytes() == b"onetwo"
    assert os.listdir(tmp_path) == ["target"]
    with pytest.raises(CacheError, match="is there already"):
        output.write(tmp_path / "target", [b"three"])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("taken", [False, True])
def test_full_disk_leaves_nothing(
    disk: DiskCache, small_disk: Path, command: str, taken: bool
) -> None:
    disk.write(fake_entry(1, 100_000))
    key = fake_entry(1, 100_000).metadata.key
    target = small_disk / "target"
    if taken:
        target.write_text("mine")
    given = ("export", str(target)) if command == "export" else ("extract", key, "-o", str(target))
    done = run(*given, "-y")
    assert done.exit_code == 1
    assert "No space left" in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["target"] * taken
    assert not taken or target.read_text() == "mine"


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def pieces():
        yield b"one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output.write(tmp_path / "target", pieces())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_standard_output(disk: DiskCache, tmp_path: Path, command: str) -> None:
    """Nothing but the file goes to stdout, and what is said of it to stderr."""
    to_file = tmp_path / "target"
    said = result(*arguments(command, str(to_file)))
    script = [sys.executable, "-m", "jitattn.cli", *arguments(command, "-"), "--json"]
    done = subprocess.run(script, capture_output=True, check=True, cwd=Path(__file__).parents[3])
    assert done.stdout == to_file.read_bytes()
    if command == "export":
        assert json.loads(done.stderr) == said
        assert said["sha256"] == hashlib.sha256(done.stdout).hexdigest()
    assert not Path("-").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", COMMANDS)
def test_standard_output_that_is_full(disk: DiskCache, command: str) -> None:
    script = [sys.executable, "-m", "jitattn.cli", *arguments(command, "-")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            script,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=Path(__file__).parents[3],
        )
    assert done.returncode != 0
    assert "standard output cannot be written" in done.stderr
    assert "Traceback" not in done.stderr

"""Tests `JITATTN_RECORD`: atomic lines, in regular files that the user may write."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jitattn.cache.files import HAS_OWNERS
from jitattn.jit import build, record
from jitattn.plan import choices
from jitattn.spec.kernel_spec import KernelSpec
from tests.cpu.processes import FORK, Child, together
from tests.cpu.specs import combine_spec

SPECS = [combine_spec(head_dim_v=dim) for dim in range(1, 9)]
LINES = [json.dumps(spec.to_choice()) for spec in SPECS]
POSIX = pytest.mark.skipif(not HAS_OWNERS, reason="needs POSIX owners, links and FIFOs")
AS_ROOT = pytest.mark.skipif(
    not HAS_OWNERS or os.geteuid() != 0, reason="needs root, to act as other users"
)


@pytest.fixture
def used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "used.jsonl"
    monkeypatch.setenv("JITATTN_RECORD", str(path))
    return path


def read_back(path: Path) -> list[KernelSpec]:
    return choices.specs_of(choices.read_file(path))


def test_short_writes_are_completed(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(record.os, "write", lambda fd, data: real(fd, data[:7]))
    for spec in SPECS:
        record.note(spec)
    monkeypatch.undo()
    assert used.read_text().splitlines() == LINES


@POSIX
def test_lock_that_cannot_be_released_is_no_failure(
    used: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = record.fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if operation == record.fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(descriptor, operation)

    monkeypatch.setattr(record.fcntl, "flock", flock)
    record.note(SPECS[0])
    assert used.read_text().splitlines() == LINES[:1]
    assert not caplog.records


@pytest.mark.parametrize("lasts", [0, 1, 3])
def test_what_cannot_be_finished_is_taken_back(
    used: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lasts: int
) -> None:
    """The disk fills up after a few bytes of the second line."""
    record.note(SPECS[0])
    real, left = os.write, [lasts]

    def write(descriptor: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return real(descriptor, data[:5])

    with monkeypatch.context() as full:
        full.setattr(record.os, "write", write)
        record.note(SPECS[1])
    assert used.read_text().splitlines() == LINES[:1]
    assert "No space left" in caplog.text
    record.note(SPECS[2])
    assert used.read_text().splitlines() == [LINES[0], LINES[2]]


@FORK
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
def test_limit_of_file_sizes(used: Path) -> None:
    """A real short write: the file may not grow beyond a part of the second line."""

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(LINES[0]) + 20, resource.RLIM_INFINITY))
        for spec in SPECS[:2]:
            record.note(spec)

    Child(write).result()
    assert used.read_text().splitlines() == LINES[:1]


def test_line_after_a_killed_writer_is_its_own(used: Path) -> None:
    used.write_text(LINES[0] + "\n" + LINES[1][:20])
    record.note(SPECS[2])
    assert used.read_text().splitlines() == [LINES[0], LINES[1][:20], LINES[2]]
    assert read_back(used) == [SPECS[0], SPECS[2]]


@FORK
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
def test_lines_of_many_writers_are_whole(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes a few bytes at a time, and now and then none are left."""
    real = os.write

    def work(number: int) -> None:
        count = 0

        def write(descriptor: int, data: bytes) -> int:
            nonlocal count
            count += 1
            if count % (17 + number) == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor, data[:9])

        record.os.write = write
        for spec in SPECS:
            record.note(spec)
        record.os.write = real

    together(work, 6)
    lines = used.read_text().splitlines()
    assert set(lines) <= set(LINES)
    assert len(lines) > 6


@POSIX
def test_lock_that_is_held_delays_little(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(record, "_LOCK_SECONDS", 0.05)
    used.touch()
    with used.open("r+b") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        record.note(SPECS[0])
    assert used.read_text().splitlines() == LINES[:1]


@POSIX
@pytest.mark.parametrize("has_reader", [False, True])
def test_fifo_does_not_hang(used: Path, caplog: pytest.LogCaptureFixture, has_reader: bool) -> None:
    os.mkfifo(used)
    reader = os.open(used, os.O_RDONLY | os.O_NONBLOCK) if has_reader else None
    thread = threading.Thread(target=record.note, args=(SPECS[0],), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert "cannot be written" in caplog.text
    if reader is not None:
        assert os.read(reader, 100) == b""
        os.close(reader)


@POSIX
@pytest.mark.parametrize("kind", ["directory", "device", "missing folder"])
def test_other_things_are_one_warning(
    used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, kind: str,
) -> None:  # fmt: skip
    path = {"directory": tmp_path, "device": Path("/dev/null")}.get(kind, tmp_path / "no" / "file")
    monkeypatch.setenv("JITATTN_RECORD", str(path))
    for spec in SPECS[:2]:
        record.note(spec)
    assert [one.levelname for one in caplog.records] == ["WARNING"]


@AS_ROOT
def test_link_of_another_user_is_not_followed(
    used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "precious"
    target.write_text("mine\n")
    used.symlink_to(target)
    os.chown(used, 54321, 54321, follow_symlinks=False)
    record.note(SPECS[0])
    assert target.read_text() == "mine\n"
    assert "link of user 54321" in caplog.text
    (tmp_path / "first").symlink_to(used)  # nor behind a link of ours
    with monkeypatch.context() as other:
        other.setenv("JITATTN_RECORD", str(tmp_path / "first"))
        record.note(SPECS[0])
    assert target.read_text() == "mine\n"
    used.unlink()
    used.symlink_to(tmp_path / "new")  # one that leads to nothing yet
    os.chown(used, 54321, 54321, follow_symlinks=False)
    record.note(SPECS[1])
    assert not (tmp_path / "new").exists()


@POSIX
def test_own_link_is_followed(used: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    used.symlink_to(Path("folder") / "file")
    record.note(SPECS[0])
    assert read_back(tmp_path / "folder" / "file") == SPECS[:1]
    used.unlink()
    used.symlink_to(used)
    record.note(SPECS[1])  # a circle is one warning


def test_trouble_with_a_record_stops_no_build(used: Path) -> None:
    used.mkdir()
    assert build.build(SPECS[0]).cubin


@POSIX
def test_killed_writers_cost_no_other_line(used: Path) -> None:
    """Processes that are killed in the middle of a write, again and again."""
    code = (
        "import os, signal, sys\n"
        "from jitattn.jit import record\n"
        "from tests.cpu.jit.test_record import SPECS\n"
        "real = os.write\n"
        "def write(fd, data):\n"
        "    real(fd, data[:30]); os.kill(os.getpid(), signal.SIGKILL)\n"
        "record.note(SPECS[int(sys.argv[1])])\n"
        "record.os.write = write\n"
        "record.note(SPECS[int(sys.argv[1]) + 1])\n"
    )
    root = Path(__file__).parents[3]
    for number in (0, 2):
        subprocess.run([sys.executable, "-c", code, str(number)], cwd=root, check=False)
    assert read_back(used) == [SPECS[0], SPECS[2]]
    assert len(used.read_text().splitlines()) == 4

"""Tests worker failures: each kernel fails with a reason, and `build_all` returns."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitattn.jit import build, pool
from jitattn.jit.pool import Outcome
from tests.cpu.processes import children
from tests.cpu.specs import combine_spec

FOUR = [combine_spec(head_dim_v=dim) for dim in (16, 32, 48, 64)]
ROOT = Path(__file__).parents[3]
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes")
_SECONDS = 60.0


def outcomes(jobs: int = 2) -> list[Outcome]:
    """What `build_all` yields, which it has to do in bounded time."""
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(pool.build_all(FOUR, jobs)), daemon=True)
    start = time.monotonic()
    thread.start()
    thread.join(_SECONDS)
    assert not thread.is_alive(), f"build_all did not end in {time.monotonic() - start:.0f} s"
    assert sorted(FOUR.index(one.spec) for one in found) == [0, 1, 2, 3]
    assert all((one.origin == "failed") == bool(one.error) for one in found)
    return found


def all_failed(text: str, jobs: int = 2) -> list[Outcome]:
    found = outcomes(jobs)
    for one in found:
        assert one.origin == "failed"
        assert text in one.error
        assert str(one.exception()) == one.error
    return found


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """Every worker is ended and waited for, if not always by the time that `build_all` ends."""
    before = children()
    yield
    deadline = time.monotonic() + 10
    while children() - before:
        assert time.monotonic() < deadline, "a worker process is left"
        time.sleep(0.02)


def test_sys_path_of_other_things_than_text(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [Path("/nonexistent"), b"/bytes", 7, None, "", "with:colon", "\udcff"]
    monkeypatch.setattr(sys, "path", [*others, *sys.path])
    assert [one.origin for one in outcomes()] == ["compiled"] * 4


def test_very_long_sys_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than what a pipe, an argument or a variable of the environment holds."""
    monkeypatch.setattr(
        sys, "path", [*sys.path, *(f"/nowhere/{n}" + "x" * 99 for n in range(3000))]
    )
    assert [one.origin for one in outcomes()] == ["compiled"] * 4


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM, errno.E2BIG, errno.EMFILE])
def test_process_is_refused(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pool.subprocess, "Popen", refuse)
    all_failed(os.strerror(code))


@pytest.mark.parametrize("name", ["pipe", "fdopen", "open"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_no_descriptors(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    module = {"pipe": subprocess.os, "fdopen": subprocess.io, "open": subprocess.io}[name]
    with monkeypatch.context() as short:
        short.setattr(module, "open" if name == "fdopen" else name, refuse, raising=False)
        all_failed(os.strerror(code))


def test_one_worker_of_two_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other does all of the work."""
    real, calls = pool.subprocess.Popen, []

    def popen(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        return real(*arguments, **options)

    monkeypatch.setattr(pool.subprocess, "Popen", popen)
    assert [one.origin for one in outcomes()] == ["compiled"] * 4


def test_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if "_serve" in repr(thread._target):  # type: ignore[attr-defined]
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    all_failed("can't start new thread")


@pytest.mark.parametrize("executable", [None, "", "/nonexistent/python", "/", "relative"])
def test_no_executable(monkeypatch: pytest.MonkeyPatch, executable: str | None) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    all_failed("worker process")


def test_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setattr(sys, "path", ["relative", *sys.path])
    (tmp_path / "gone").rmdir()
    assert [one.origin for one in outcomes()] == ["compiled"] * 4


def impostor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make a script the Python that workers run."""
    path = tmp_path / "python"
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@POSIX
@pytest.mark.parametrize(
    "script",
    [
        "exit 0",
        "exit 3",
        "kill -9 $$",
        "echo garbage",
        "read line; echo garbage",
        "while read line; do echo garbage; done",
        "exec cat",
        "exec yes",
        'read line; echo \'{"ready": "0"}\'; cat',
        "printf 'no end of a line'; exec sleep 0.2",
        "exec <&-; sleep 0.2",
    ],
)
def test_executable_that_is_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    impostor(tmp_path, monkeypatch, f"#!/bin/sh\n{script}\n")
    all_failed("does not work as a worker process")


@POSIX
@pytest.mark.parametrize("script", ["exec sleep 300", "sleep 300", "sleep 300 & wait"])
def test_worker_that_is_never_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(pool, "_START_SECONDS", 0.5)
    impostor(tmp_path, monkeypatch, f"#!/bin/sh\n{script}\n")
    all_failed("was not ready in")


#: A worker that begins as it should, and answers with the line that `ANSWER` makes of the request.
LIAR = """#!{python}
import base64, json, sys, time
sys.path[:0] = [{root!r}]
print(json.dumps({{"ready": json.loads(sys.stdin.readline())["token"]}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    {answer}
"""


@POSIX
@pytest.mark.parametrize(
    "answer",
    [
        "print('garbage', flush=True)",
        "print(line, end='', flush=True)",
        "print('[' * 100000, flush=True)",
        "print('{}', flush=True)",
        "print('[]', flush=True)",
        "print('null', flush=True)",
        "print('NaN', flush=True)",
        'print(\'{"error": ""}\', flush=True)',
        'print(\'{"error": "", "origin": "disk", "metadata": {}, "cubin": ""}\', flush=True)',
        "print('9' * 5000, flush=True)",
        "sys.stdout.buffer.write(b'\\xff\\xfe\\n'); sys.stdout.flush()",
        'print(\'{"error": 7, "error_kind": []}\', flush=True)',
    ],
)
def test_worker_that_answers_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    real = sys.executable
    impostor(tmp_path, monkeypatch, LIAR.format(python=real, root=str(ROOT), answer=answer))
    all_failed("the worker's answer was damaged")


#: Answers with another kernel than the one that was asked for, or with one that was changed.
OTHER = """
    from tests.cpu.specs import fake_entry
    from dataclasses import asdict
    entry = fake_entry(1)
    metadata = {**asdict(entry.metadata), **CHANGE}
    cubin = base64.b64encode(entry.cubin).decode()
    reply = {"error": "", "error_kind": "", "origin": ORIGIN, "metadata": metadata, "cubin": cubin}
    print(json.dumps(reply), flush=True)
"""


@POSIX
@pytest.mark.parametrize(
    ("change", "origin", "text"),
    [
        ("{}", "'compiled'", "of another kernel"),
        ("{}", "'heaven'", "of another kind"),
        ("{}", "['disk']", "of another kind"),
        ("{'toolchain': 'nvrtc ' + '9' * 5000}", "'disk'", "of another kind"),
        ("{'spec': request}", "'disk'", "of another kernel"),
    ],
)
def test_worker_that_answers_with_another_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, origin: str, text: str
) -> None:
    answer = OTHER.replace("CHANGE", change).replace("ORIGIN", origin)
    impostor(
        tmp_path, monkeypatch, LIAR.format(python=sys.executable, root=str(ROOT), answer=answer)
    )
    all_failed(text)
    assert build.stats().compiled == build.stats().disk_hits == 0


@POSIX
@pytest.mark.parametrize(
    "answer",
    ["time.sleep(300)", "print('half', end='', flush=True); time.sleep(300)"],
)
def test_worker_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "0")
    monkeypatch.setattr(pool, "_BUILD_SECONDS", 0.4)
    impostor(
        tmp_path, monkeypatch, LIAR.format(python=sys.executable, root=str(ROOT), answer=answer)
    )
    all_failed("gave no answer in")


@POSIX
def test_worker_that_dies_at_each_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "sys.stdout.write('half'); sys.stdout.flush(); raise SystemExit(7)"
    impostor(
        tmp_path, monkeypatch, LIAR.format(python=sys.executable, root=str(ROOT), answer=answer)
    )
    all_failed("a worker process died (status 7;")


@pytest.mark.parametrize(
    ("error", "jobs"),
    [(ZeroDivisionError("no"), 1), (OSError(5, "I/O"), 1), (MemoryError(), 1), (KeyError("k"), 2)],
)
def test_any_exception_is_an_outcome(
    monkeypatch: pytest.MonkeyPatch, error: Exception, jobs: int
) -> None:
    """In this process, and where what a worker answered is kept."""

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(build, "build", fail)
    monkeypatch.setattr(build, "adopt", fail)
    for one in all_failed(type(error).__name__ if jobs == 1 else str(error), jobs):
        assert "Traceback" not in one.error


def test_wrong_environment_is_said_by_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "soon")
    all_failed("JITATTN_LOCK_TIMEOUT='soon'")


_FEW = """
from jitattn.jit import pool
from tests.cpu.jit.test_pool_trouble import FOUR
found = list(pool.build_all(FOUR[:2], 2))
assert sorted(FOUR.index(one.spec) for one in found) == [0, 1]
for one in found:
    print(one.origin, one.error)
"""


@POSIX
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, for ulimit")
@pytest.mark.parametrize("limit", [8, 9, 16, 32])
def test_few_descriptors(limit: int) -> None:
    done = subprocess.run(
        ["bash", "-c", f'ulimit -n {limit}; exec "$0" -c "$1"', sys.executable, _FEW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line == "compiled " or line.startswith("failed ") for line in lines), lines
    assert limit > 8 or all("Too many open files" in line for line in lines)


@POSIX
def test_no_stderr_for_workers() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" 2>&-', sys.executable, _FEW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.stdout.splitlines() == ["compiled "] * 2

"""Builds many kernels in parallel worker processes. Needs no GPU.

Processes, not threads, because NVRTC serializes much of a compile within a process. Not the workers
of `multiprocessing`, because those import the caller's main module; a script or a notebook can call
`warmup` anywhere.

Any failure of a worker becomes the outcome of the kernel that it was building, with the reason; if
no worker can be started, the outcome of all remaining kernels. Each worker has a thread that may
block on its process. `build_all` itself waits for no worker longer than a start or a compile may
take.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, get_args

from jitattn import errors
from jitattn.cache import files, settings
from jitattn.cache.entry import KERNEL_DIGITS, MAX_CUBIN_BYTES, fault, from_dict
from jitattn.errors import JitAttnError
from jitattn.jit import build

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from jitattn.jit.build import Built
    from jitattn.spec.kernel_spec import KernelSpec

_WORKER: Final = Path(__file__).with_name("worker.py")
#: Time limits in seconds: until a worker is ready, and to build a kernel once it has its lock.
_START_SECONDS: Final = 60.0
_BUILD_SECONDS: Final = 600.0
_LOOK_SECONDS: Final = 0.5  # interval between checks of the deadlines
_END_SECONDS: Final = 5.0  # limit for a killed process and its thread
_DEATH_SECONDS: Final = 0.5  # limit for a process that ends by itself
_MAX_ANSWER: Final = 2 * MAX_CUBIN_BYTES
_SHOWN: Final = 60  # bytes of an invalid answer that are reported
#: A worker, and the number of a kernel with its outcome or the reason why the worker ended.
_News: TypeAlias = tuple["_Worker", int, "Outcome"] | tuple["_Worker", None, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of building one kernel."""

    spec: KernelSpec
    origin: str  #: an `Origin`, or "failed"
    seconds: float
    error: str = ""
    error_kind: str = ""  #: name of the exception's class
    built: Built | None = None

    def exception(self) -> JitAttnError:
        """Return the exception of a failed kernel, rebuilt if it was raised in a worker."""
        kind = getattr(errors, self.error_kind, None)
        if isinstance(kind, type) and issubclass(kind, JitAttnError):
            return kind(self.error)
        return JitAttnError(self.error)


def build_all(
    specs: Sequence[KernelSpec], jobs: int | None = None
) -> Generator[Outcome, None, None]:
    """Build kernels in `jobs` processes and yield their outcomes in order of completion.

    Afterwards the kernels are in this process's memory. With one job or one kernel, everything
    happens in this process.
    """
    jobs = min(jobs or num_processors(), len(specs))
    if jobs <= 1:
        yield from map(build_here, specs)
        return
    crew = _Crew(specs)
    try:
        yield from crew.outcomes(jobs)
    finally:  # also if the caller stopped early
        crew.dismiss()


def num_processors() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_here(spec: KernelSpec) -> Outcome:
    """Build a kernel in this process."""
    start = time.perf_counter()
    try:
        built = build.build(spec)
    except Exception as error:  # noqa: BLE001 - of one kernel; the others are built all the same
        return _failed(spec, error, time.perf_counter() - start)
    return Outcome(spec=spec, origin=built.origin, seconds=time.perf_counter() - start, built=built)


def to_answer(outcome: Outcome, warnings: Sequence[tuple[str, str]] = ()) -> bytes:
    """Encode an outcome for the parent of a worker, on one line.

    `warnings` are what was logged meanwhile, each with its subject.
    """
    reply: dict[str, object] = {
        "error": outcome.error,
        "error_kind": outcome.error_kind,
        "warnings": list(warnings),
    }
    if outcome.built is not None:
        reply["origin"] = outcome.origin
        reply["metadata"] = asdict(outcome.built.metadata)
        reply["cubin"] = base64.b64encode(outcome.built.cubin).decode()
    return json.dumps(reply).encode()


def _failed(spec: KernelSpec, error: Exception | str, seconds: float = 0.0) -> Outcome:
    kind, text = "", str(error) or "no reason is known"
    if isinstance(error, JitAttnError):
        kind = type(error).__name__
    elif isinstance(error, Exception):
        text = f"{type(error).__name__}: {error}"
    return Outcome(spec=spec, origin="failed", seconds=seconds, error=text, error_kind=kind)


class _Crew:
    """Workers, their queue of kernels, and the outcomes."""

    def __init__(self, specs: Sequence[KernelSpec]) -> None:
        self.specs = specs
        self.work: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.news: queue.SimpleQueue[_News] = queue.SimpleQueue()
        for number in range(len(specs)):
            self.work.put(number)
        self.build_seconds = _BUILD_SECONDS
        with contextlib.suppress(JitAttnError):  # each worker reports it
            self.build_seconds += settings.lock_timeout()
        self._active: set[_Worker] = set()
        self._late: dict[_Worker, _Wait] = {}
        self._reason = ""

    def outcomes(self, jobs: int) -> Iterator[Outcome]:
        """Start the workers and yield one outcome for each kernel."""
        for _ in range(jobs):
            self._hire()
        missing = dict(enumerate(self.specs))
        while missing and self._active:
            for number, outcome in self._next():
                if missing.pop(number, None) is not None:
                    yield outcome
        for spec in missing.values():
            yield _failed(spec, self._reason)

    def dismiss(self) -> None:
        """End every process, which unblocks the threads that wait for them."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.work.get_nowait()
        for worker in self._active:
            worker.stop()
        deadline = time.monotonic() + _END_SECONDS
        for worker in self._active:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _hire(self) -> None:
        worker = _Worker(self)
        try:
            worker.start()
        except RuntimeError as error:
            self._reason = f"worker processes need threads ({error}); try fewer with -j"
        else:
            self._active.add(worker)

    def _next(self) -> Iterator[tuple[int, Outcome]]:
        """Wait briefly for messages; yield kernels with their outcomes, if any."""
        try:
            worker, number, what = self.news.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            yield from self._give_up()
            return
        if number is not None and isinstance(what, Outcome):
            yield number, what
        elif worker in self._active:
            self._active.remove(worker)
            self._reason = str(what) or self._reason

    def _give_up(self) -> Iterator[tuple[int, Outcome]]:
        """Abandon workers past their deadline; yield the kernels they were building.

        Two checks in a row must find a worker late: after this process itself was suspended, every
        worker is late at the first.
        """
        now, before = time.monotonic(), self._late
        self._late = {one: one.wait for one in self._active if now > one.wait.deadline}
        for worker, wait in self._late.items():
            if before.get(worker) is not wait:
                continue
            worker.stop()
            self._active.remove(worker)
            if wait.number is None:
                self._reason = f"a worker process was not ready in {_START_SECONDS:.0f} s"
                continue
            error = f"a worker process gave no answer in {self.build_seconds:.0f} s"
            yield wait.number, _failed(self.specs[wait.number], error, self.build_seconds)
            self._hire()


class _StartError(Exception):
    """Error: no worker process can be started."""


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    """Deadline of a worker, and the kernel it is building (None: it is starting)."""

    deadline: float
    number: int | None = None


class _Worker:
    """Thread with a process that builds one kernel after another.

    A process that died or gave an invalid answer is replaced for the next kernel; if none can be
    started, the thread ends.
    """

    def __init__(self, crew: _Crew) -> None:
        self.wait = _Wait(math.inf)
        self._crew = crew
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the thread; raises RuntimeError if that is impossible."""
        self._thread.start()

    def stop(self) -> None:
        """End the process and start no other."""
        with self._lock:
            self._is_stopped = True
            if self._process is not None:
                _kill(self._process)

    def join(self, seconds: float) -> None:
        """Wait for the thread, which ends after its process."""
        self._thread.join(seconds)

    def _serve(self) -> None:
        crew, reason = self._crew, ""
        try:
            while not crew.work.empty():
                self.wait = _Wait(time.monotonic() + _START_SECONDS)
                process = self._running()
                try:
                    number = crew.work.get_nowait()
                except queue.Empty:
                    break
                self.wait = _Wait(time.monotonic() + crew.build_seconds, number)
                outcome = _build_in(process, crew.specs[number])
                self.wait = _Wait(math.inf)
                crew.news.put((self, number, outcome))
        except _StartError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - it has to be known why the thread ended
            reason = f"{type(error).__name__}: {error}"
        finally:
            self.wait = _Wait(math.inf)
            if self._process is not None:
                _end(self._process)
            crew.news.put((self, None, reason))

    def _running(self) -> subprocess.Popen[bytes]:
        """Return a process that is ready; start one if there is none."""
        process = self._process
        if process is not None and process.poll() is None:
            return process
        process = _new_process()
        with self._lock:
            self._process = process
            if self._is_stopped:
                raise _StartError("stopped")
        token = secrets.token_hex(8)
        hello = {"path": _import_path(), "token": token}
        answer = _ask(process, json.dumps(hello).encode())
        if answer != json.dumps({"ready": token}).encode():
            status = _end(process, _DEATH_SECONDS)
            said = "nothing" if answer is None else repr(answer[:_SHOWN])
            raise _StartError(
                f"{sys.executable} does not work as a worker process (it said {said}; status "
                f"{status}); it has to be the Python that runs here; or build with one job"
            )
        return process


def _build_in(process: subprocess.Popen[bytes], spec: KernelSpec) -> Outcome:
    """Build a kernel in a worker process; end the process if it fails."""
    start = time.perf_counter()
    answer = _ask(process, json.dumps(spec.to_dict()).encode())
    seconds = time.perf_counter() - start
    if answer is None:
        code = _end(process, _DEATH_SECONDS)
        error = f"a worker process died (status {code}; out of memory?); try fewer with -j"
        return _failed(spec, error, seconds)
    try:
        return _outcome_from(spec, json.loads(answer), seconds)
    except Exception as error:  # noqa: BLE001 - of an answer that may be anything
        _end(process)
        return _failed(spec, f"the worker's answer was damaged ({error})", seconds)


def _outcome_from(spec: KernelSpec, reply: dict[str, Any], seconds: float) -> Outcome:
    """Check the answer of a worker and store the kernel.

    Raises
    ------
    Exception
        The answer is malformed, or its kernel fails the checks.
    """
    for subject, text in reply.get("warnings", ()):
        files.warn_once(subject, str(text))  # once for all workers
    error, kind = reply["error"], reply["error_kind"]
    if error and isinstance(error, str) and isinstance(kind, str):
        return Outcome(spec=spec, origin="failed", seconds=seconds, error=error, error_kind=kind)
    origin, metadata = reply["origin"], from_dict(reply["metadata"])
    cubin = base64.b64decode(reply["cubin"], validate=True)
    if metadata is None or origin not in get_args(build.Origin):
        raise ValueError("it is of another kind")
    if metadata.key[:KERNEL_DIGITS] != build.key_of(spec)[:KERNEL_DIGITS]:
        raise ValueError("it is of another kernel")
    reason = fault(cubin, metadata, spec.arch)
    if reason is not None:
        raise ValueError(reason)
    built = build.Built(
        spec=spec,
        key=metadata.key,
        cubin=cubin,
        metadata=metadata,
        origin=origin,
    )
    return Outcome(spec=spec, origin=origin, seconds=seconds, built=build.adopt(built))


def _new_process() -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise _StartError("sys.executable is not set, so no worker process can be started")
    options = {"-E": sys.flags.ignore_environment, "-s": sys.flags.no_user_site, "-P": True}
    try:
        return subprocess.Popen(
            [sys.executable, *(name for name, is_on in options.items() if is_on), str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            # The process and its children form a group, which is ended as a whole.
            process_group=None if sys.platform == "win32" else 0,
        )
    except Exception as error:
        raise _StartError(
            f"a worker process could not be started ({type(error).__name__}: {error}); "
            "try fewer with -j"
        ) from error


def _import_path() -> list[str]:
    """Return sys.path without the working directory."""
    found = []
    for entry in sys.path:
        if isinstance(entry, str) and entry:  # the import system ignores other types
            with contextlib.suppress(OSError):  # the working directory was deleted
                found.append(os.path.abspath(entry))
    return found


def _ask(process: subprocess.Popen[bytes], line: bytes) -> bytes | None:
    """Send a line to a process and return its answer; None if the process has died."""
    if process.stdin is None or process.stdout is None:
        return None
    try:
        process.stdin.write(line + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline(_MAX_ANSWER)
    except (OSError, ValueError):  # ValueError: the pipe was closed
        return None
    if answer.endswith(b"\n"):
        return answer[:-1]
    return answer if len(answer) == _MAX_ANSWER else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], patience: float = 0.0) -> int | None:
    """Kill a process that has not ended, close its pipes and return its status."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    _kill(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # output that was not yet flushed
                pipe.close()
    return process.returncode

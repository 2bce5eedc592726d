"""Building many kernels side by side, in worker processes. Needs no GPU.

Processes, not threads: NVRTC serialises much of a compile within a process. And workers of our own,
not those of `multiprocessing`: these never import the caller's main module, so a script or a
notebook can call `warmup` anywhere.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jitattn import errors
from jitattn.errors import JitAttnError
from jitattn.jit import build
from jitattn.jit.entry import from_dict, sha256
from jitattn.jit.spec import spec_from_dict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TextIO

    from jitattn.jit.build import Built
    from jitattn.jit.spec import KernelSpec

_PACKAGE_PARENT: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one kernel."""

    spec: KernelSpec
    origin: str  #: an `Origin`, or "failed"
    seconds: float
    error: str = ""
    error_kind: str = ""  #: name of the exception's class
    built: Built | None = None

    def exception(self) -> JitAttnError:
        """Return the exception of a kernel that failed, also if it was raised in a worker."""
        kind = getattr(errors, self.error_kind, None)
        if isinstance(kind, type) and issubclass(kind, JitAttnError):
            return kind(self.error)
        return JitAttnError(self.error)


def build_all(specs: Sequence[KernelSpec], jobs: int | None = None) -> Iterator[Outcome]:
    """Build kernels in `jobs` processes, yielding outcomes as they come.

    What the workers built is in this process's memory afterwards. With one job, or one kernel,
    everything happens in this process.
    """
    jobs = min(jobs or num_processors(), len(specs))
    if jobs <= 1:
        yield from map(_build_here, specs)
        return
    work: queue.SimpleQueue[KernelSpec] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    for spec in specs:
        work.put(spec)
    workers = [_Worker() for _ in range(jobs)]
    threads = [
        threading.Thread(target=_serve, args=(worker, work, done), daemon=True)
        for worker in workers
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in specs:
            yield done.get()
    finally:  # the caller may have stopped early
        with contextlib.suppress(queue.Empty):
            while True:
                work.get_nowait()
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()


def num_processors() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    """A process that builds one kernel after another; a new one is started when it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._is_stopped = False
        self._lock = threading.Lock()

    def build(self, spec: KernelSpec) -> Outcome:
        start = time.perf_counter()
        process = self._running()
        if process is None:
            return Outcome(spec=spec, origin="failed", seconds=0.0, error="stopped")
        answer = ""
        with contextlib.suppress(OSError):  # it died before it could be asked
            process.stdin.write(json.dumps(spec.to_dict()) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answer = process.stdout.readline()  # type: ignore[union-attr]
        seconds = time.perf_counter() - start
        if not answer.endswith("\n"):
            code = _end(process)
            error = f"a worker process died (status {code}; out of memory?); try fewer with -j"
            return Outcome(spec=spec, origin="failed", seconds=seconds, error=error)
        reply = json.loads(answer)
        built = _built_from(spec, reply)
        if built is None:
            error = reply.get("error") or "the worker's answer was damaged"
            kind = reply.get("error_kind", "")
            return Outcome(
                spec=spec, origin="failed", seconds=seconds, error=error, error_kind=kind
            )
        return Outcome(spec=spec, origin=built.origin, seconds=seconds, built=build.adopt(built))

    def stop(self) -> None:
        """End the process; a thread that waits for its answer finds that there is none."""
        with self._lock:
            self._is_stopped = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Close what led to the process, when no thread uses it any more."""
        if self._process is not None:
            _end(self._process)

    def _running(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._is_stopped:
                return None
            if self._process is None or self._process.poll() is not None:
                path = [str(_PACKAGE_PARENT), *(entry for entry in sys.path if entry)]
                self._process = subprocess.Popen(
                    # -P: the working directory is no place to import from.
                    [sys.executable, "-P", "-m", "jitattn.jit.pool"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                )
            return self._process


def _end(process: subprocess.Popen[str]) -> int:
    """Wait for a process that is ending, and close what led to it."""
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not yet written
                pipe.close()
    return code


def _serve(
    worker: _Worker,
    work: queue.SimpleQueue[KernelSpec],
    done: queue.SimpleQueue[Outcome],
) -> None:
    while True:
        try:
            spec = work.get_nowait()
        except queue.Empty:
            return
        done.put(worker.build(spec))


def _build_here(spec: KernelSpec) -> Outcome:
    start = time.perf_counter()
    try:
        built = build.build(spec)
    except JitAttnError as error:
        seconds = time.perf_counter() - start
        kind = type(error).__name__
        return Outcome(
            spec=spec, origin="failed", seconds=seconds, error=str(error), error_kind=kind
        )
    return Outcome(spec=spec, origin=built.origin, seconds=time.perf_counter() - start, built=built)


def _built_from(spec: KernelSpec, reply: dict[str, Any]) -> Built | None:
    metadata = from_dict(reply.get("metadata"))
    if metadata is None:
        return None
    cubin = base64.b64decode(reply["cubin"])
    if sha256(cubin) != metadata.sha256:
        return None
    return build.Built(
        spec=spec, key=metadata.key, cubin=cubin, metadata=metadata, origin=reply["origin"]
    )


def _work(requests: TextIO, replies: TextIO) -> None:
    """Run a worker: one line of JSON in, one out, until the input ends."""
    for line in requests:
        outcome = _build_here(spec_from_dict(json.loads(line)))
        reply: dict[str, Any] = {"error": outcome.error, "error_kind": outcome.error_kind}
        if outcome.built is not None:
            reply["origin"] = outcome.origin
            reply["metadata"] = asdict(outcome.built.metadata)
            reply["cubin"] = base64.b64encode(outcome.built.cubin).decode()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _main() -> None:
    # Nothing but replies may reach the pipe, whatever a library prints.
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        _work(sys.stdin, replies)


if __name__ == "__main__":
    _main()

"""Runs a function in many forked processes that start at once, within milliseconds.

Errors of a child become errors of the test. The children are killed if they outlive the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Child:
    """A forked process; its function's result comes back as JSON."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                answer, status = json.dumps(work()), 0
            except BaseException:  # noqa: BLE001 - the parent shows it, whatever it is
                answer, status = traceback.format_exc(), 1
            os.write(writer, answer.encode())
            os._exit(status)
        os.close(writer)

    def result(self, timeout: float = 600.0) -> Any:
        """What the function returned."""
        deadline, text = time.monotonic() + timeout, b""
        while True:
            ready, _, _ = select.select([self.reader], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise TimeoutError(f"the child did not answer in {timeout} s")
            part = os.read(self.reader, 65536)
            if not part:
                break
            text += part
        status = self.wait()
        assert status == 0, f"the child ended with status {status}: {text.decode()}"
        return json.loads(text)

    def has_answered(self, patience: float = 0.001) -> bool:
        """Whether there is a result, or none will come."""
        return bool(select.select([self.reader], [], [], patience)[0])

    def kill(self) -> int:
        """End it the hard way."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        if self.pid:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self.reader)
            self.pid = 0
        return self.status


def together(
    work: Callable[[int], Any], count: int, meanwhile: Callable[[], None] = lambda: None
) -> list[Any]:
    """Run `work(0)` … `work(count - 1)` in children that begin at one moment; their results.

    `meanwhile` is called again and again until the last has ended.
    """
    gate, opener = os.pipe()
    started: list[Child] = []
    try:
        for number in range(count):

            def gated(number: int = number) -> Any:
                os.close(opener)
                os.read(gate, 1)  # until the parent closes the other end
                return work(number)

            started.append(Child(gated))
        os.close(opener)
        while any(not child.has_answered() for child in started):
            meanwhile()
        return [child.result() for child in started]
    finally:
        os.close(gate)
        for child in started:
            if child.pid:
                child.kill()


def children() -> set[int]:
    """Processes that this one has started and not waited for; none where that cannot be told."""
    found: set[int] = set()
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found.update(map(int, listed.read_text().split()))
    return found

"""Faults at system calls: any one of an operation fails, before or after it had its effect.

An operation is run once to count its calls, and then again and again, each time with a fault at
another call. Nothing depends on time: a fault is named by the number of its call.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

When = Literal["before", "after"]

_LOOKING = ("ENOENT", "ENOTDIR", "EACCES", "ELOOP", "ESTALE")
_CHANGING = ("ENOENT", "EPERM", "ENOSPC", "EIO")
#: What each call may fail with: an error of each class that Python or the cache tells apart.
ERRORS: dict[str, tuple[str, ...]] = {
    "open": _LOOKING,
    "create": (*_CHANGING, "EEXIST", "EMFILE"),
    "close": ("EIO",),
    "read": ("EIO",),
    "write": ("ENOSPC", "EPIPE"),
    "fsync": ("EIO",),
    "fstat": ("ESTALE",),
    "stat": _LOOKING,
    "lstat": _LOOKING,
    "scandir": (*_LOOKING, "EMFILE"),
    "mkdir": (*_CHANGING, "EEXIST"),
    "rmdir": (*_CHANGING, "ENOTEMPTY"),
    "unlink": (*_CHANGING, "EISDIR"),
    "rename": (*_CHANGING, "ENOTEMPTY"),
    "replace": _CHANGING,
    "link": (*_CHANGING, "EEXIST"),
    "utime": ("EPERM", "ENOENT"),
    "fchmod": ("EPERM",),
    "flock": ("EWOULDBLOCK", "ENOLCK"),
}


#: Those that change no file. Only closing has an effect all the same: the descriptor is gone.
_LOOKS = ("open", "read", "fstat", "stat", "lstat", "scandir", "flock", "close")


@dataclass(frozen=True)
class Fault:
    """What happens at which call."""

    call: int
    name: str
    when: When
    act: Callable[[], None]
    text: str


@dataclass
class Calls:
    """The system calls of this process while it is watched."""

    names: list[str] = field(default_factory=list)
    fault: Fault | None = None
    is_on: bool = False

    @contextmanager
    def watched(self, fault: Fault | None = None) -> Iterator[list[str]]:
        """Count calls, and let one of them fail."""
        self.names, self.fault, self.is_on = [], fault, True
        try:
            yield self.names
        finally:
            self.is_on = False

    def wrap(self, function: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not self.is_on:
                return real(*arguments, **named)
            number, fault = len(self.names), self.fault
            name = "create" if function == "open" and arguments[1] & os.O_CREAT else function
            self.names.append(name)
            is_here = fault is not None and fault.call == number
            assert not is_here or fault.name == name, "the calls are not those that were counted"
            if is_here and fault.when == "before":
                fault.act()
            try:
                result = real(*arguments, **named)
            except OSError:
                if is_here:
                    fault.act()
                raise
            if is_here:
                self._forget(name, result)
                fault.act()
            return result

        return call

    def _forget(self, name: str, result: Any) -> None:
        """Close what the caller will never hear of."""
        self.is_on = False
        if name == "create":
            os.close(result)
        self.is_on = True


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Watch every system call that the cache makes. Nothing is synced, which takes its time."""
    calls = Calls()
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for name in ERRORS.keys() - {"create", "flock"}:
        if hasattr(os, name):
            monkeypatch.setattr(os, name, calls.wrap(name, getattr(os, name)))
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", calls.wrap("flock", fcntl.flock))
    return calls


def faults(names: list[str]) -> Iterator[Fault]:
    """Yield every error at every call, before and after its effect."""
    for number, name in enumerate(names):
        for error in ERRORS[name]:
            for when in _moments(name):
                yield Fault(
                    number, name, when, _raise(error), f"{error} {when} call {number}, {name}"
                )


def _moments(name: str) -> tuple[When, ...]:
    if name == "close":
        return ("after",)
    return ("before",) if name in _LOOKS else ("before", "after")


def kills(names: list[str], act: Callable[[], None]) -> Iterator[Fault]:
    """Yield the end of the process after every call that changes something, and at the first."""
    yield Fault(0, names[0], "before", act, "killed at once")
    for number, name in enumerate(names):
        if name not in _LOOKS:
            yield Fault(number, name, "after", act, f"killed after call {number}, {name}")


def _raise(name: str) -> Callable[[], None]:
    code = getattr(errno, name)

    def act() -> None:
        raise OSError(code, os.strerror(code))

    return act


def descriptors() -> set[str]:
    """Descriptors that this process has open; empty where that cannot be told."""
    folder = Path("/proc/self/fd")
    return set(os.listdir(folder)) if folder.is_dir() else set()


@dataclass(frozen=True)
class Snapshot:
    """Files and directories below a folder, to be put there again."""

    folder: str
    names: list[tuple[str, os.stat_result, bytes | None]]

    @classmethod
    def of(cls, folder: Path) -> Snapshot:
        names = [
            (str(path), path.stat(), path.read_bytes() if path.is_file() else None)
            for path in (folder, *sorted(folder.rglob("*")))
        ]
        return cls(str(folder), names)

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        for path, status, content in self.names:
            if content is None:
                os.mkdir(path, status.st_mode & 0o777)
            else:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, status.st_mode & 0o777)
                os.write(descriptor, content)
                os.close(descriptor)
        for path, status, _ in reversed(self.names):
            if status.st_mtime < 1000:  # it was aged
                os.utime(path, (status.st_atime, status.st_mtime))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content; directories and the like have none."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }

"""Injects faults at system calls: one call of an operation fails, before or after its effect.

An operation runs once to count its calls, and then once for every error that the manual lists for
each call. The error occurs once, or at every later call of that name as well. Nothing depends on
time: a fault is named by the number of its call.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any, Literal

import pytest

When = Literal["before", "after"]


def _errors(text: str) -> tuple[str, ...]:
    """Names of errors that this platform knows, each number once."""
    numbers = {getattr(errno, name): name for name in text.split() if hasattr(errno, name)}
    return tuple(numbers.values())


_STAT = _errors("EACCES EBADF EFAULT EINVAL EIO ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EOVERFLOW")
_OPEN = _errors(
    "EACCES EAGAIN EBADF EBUSY EDQUOT EEXIST EFAULT EFBIG EILSEQ EINTR EINVAL EIO EISDIR ELOOP "
    "EMFILE ENAMETOOLONG ENFILE ENODEV ENOENT ENOMEM ENOSPC ENOSR ENOTDIR ENXIO EOPNOTSUPP "
    "EOVERFLOW EPERM EROFS ETXTBSY"
)
_RENAME = _errors(
    "EACCES EBADF EBUSY EDQUOT EEXIST EFAULT EILSEQ EINVAL EIO EISDIR ELOOP EMLINK ENAMETOOLONG "
    "ENOENT ENOMEM ENOSPC ENOTDIR ENOTEMPTY EPERM EROFS ETXTBSY EXDEV"
)
_LISTED: dict[str, tuple[str, ...]] = {
    "open": _OPEN,
    "create": _OPEN,
    "close": _errors("EBADF EDQUOT EINPROGRESS EINTR EIO ENOSPC"),
    "read": _errors(
        "EAGAIN EBADF EBADMSG ECONNRESET EFAULT EINTR EINVAL EIO EISDIR ENOBUFS ENOMEM ENOTCONN "
        "ENXIO EOVERFLOW ETIMEDOUT"
    ),
    "write": _errors(
        "EAGAIN EBADF ECONNRESET EDESTADDRREQ EDQUOT EFAULT EFBIG EINTR EINVAL EIO ENETDOWN "
        "ENETUNREACH ENOBUFS ENOSPC ENXIO EPERM EPIPE ERANGE"
    ),
    "fsync": _errors("EBADF EDQUOT EINTR EINVAL EIO ENOSPC EROFS"),
    "fstat": _STAT,
    "stat": _STAT,
    "lstat": _STAT,
    # opendir, and dup where a descriptor is listed
    "scandir": _errors(
        "EACCES EBADF EBUSY EINTR EINVAL EIO ELOOP EMFILE ENAMETOOLONG ENFILE ENOENT ENOMEM ENOTDIR"
    ),
    "readdir": _errors("EBADF EFAULT EINVAL EIO ENOENT ENOTDIR EOVERFLOW"),
    "lseek": _errors("EBADF EINVAL ENXIO EOVERFLOW ESPIPE"),
    "ftruncate": _errors("EACCES EBADF EFBIG EINTR EINVAL EIO EPERM EROFS ETXTBSY"),
    "readlink": _errors("EACCES EBADF EFAULT EINVAL EIO ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR"),
    "getcwd": _errors("EACCES EFAULT EINVAL ENAMETOOLONG ENOENT ENOMEM ERANGE"),
    "mkdir": _errors(
        "EACCES EBADF EDQUOT EEXIST EFAULT EILSEQ EINVAL EIO ELOOP EMLINK ENAMETOOLONG ENOENT "
        "ENOMEM ENOSPC ENOTDIR EPERM EROFS"
    ),
    "rmdir": _errors(
        "EACCES EBADF EBUSY EEXIST EFAULT EINVAL EIO ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR "
        "ENOTEMPTY EPERM EROFS"
    ),
    "unlink": _errors(
        "EACCES EBADF EBUSY EFAULT EINVAL EIO EISDIR ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR "
        "EPERM EROFS ETXTBSY"
    ),
    "rename": _RENAME,
    "replace": _RENAME,
    "link": _errors(
        "EACCES EBADF EDQUOT EEXIST EFAULT EILSEQ EINVAL EIO ELOOP EMLINK ENAMETOOLONG ENOENT "
        "ENOMEM ENOSPC ENOTDIR EPERM EROFS EXDEV"
    ),
    "utime": _errors(
        "EACCES EBADF EFAULT EINVAL EIO ELOOP ENAMETOOLONG ENOENT ENOTDIR EPERM EROFS ESRCH"
    ),
    "fchmod": _errors(
        "EACCES EBADF EFAULT EINTR EINVAL EIO ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR ENOTSUP "
        "EPERM EROFS"
    ),
    "flock": _errors("EBADF EINTR EINVAL ENOLCK ENOSYS EOPNOTSUPP EWOULDBLOCK"),
}
#: Every error of each call, by the Linux manual pages and POSIX.1-2024; and ESTALE, which network
#: filesystems add to all of them.
ERRORS = {call: (*listed, *_errors("ESTALE")) for call, listed in _LISTED.items()}

#: Calls that change no file. Closing has an effect all the same: the descriptor is gone.
_LOOKS = (
    *("open", "read", "lseek", "fstat", "stat", "lstat", "readlink"),
    *("scandir", "readdir", "getcwd", "flock", "close"),
)
#: Functions of `os` that cannot fail, and those by which a test ends a process.
_HARMLESS = ("fspath", "getpid", "geteuid", "kill", "strerror")


@dataclass(frozen=True)
class Fault:
    """An error or the end of the process, at one call."""

    call: int
    name: str
    when: When
    act: Callable[[], None]
    text: str
    #: Every later call of this name fails as well: a full disk stays full.
    lasts: bool = False


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
            if fault is not None and fault.lasts and fault.call < number and fault.name == name:
                is_here = True
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
            return _Listing(result, self) if name == "scandir" else result

        return call

    def _forget(self, name: str, result: Any) -> None:
        """Close what the caller will never hear of."""
        self.is_on = False
        if name == "create":
            os.close(result)
        self.is_on = True

    def refuse(self, function: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """Make a call that is not in `ERRORS` an error while calls are watched."""

        def call(*arguments: Any, **named: Any) -> Any:
            assert not self.is_on, f"no errors are listed for os.{function}"
            return real(*arguments, **named)

        return call


class _Listing:
    """A directory that is being listed: each step is a call of its own."""

    def __init__(self, real: Any, calls: Calls) -> None:
        self._real = real
        self._next = calls.wrap("readdir", lambda: next(real))

    def __enter__(self) -> _Listing:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    def __iter__(self) -> _Listing:
        return self

    def __next__(self) -> Any:
        return self._next()


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Watch every system call that the cache makes. Nothing is synced, which takes its time."""
    calls = Calls()
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for name in dir(os):
        real = getattr(os, name)
        if name in ERRORS:
            monkeypatch.setattr(os, name, calls.wrap(name, real))
        elif isinstance(real, BuiltinFunctionType) and name not in _HARMLESS:
            monkeypatch.setattr(os, name, calls.refuse(name, real))
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", calls.wrap("flock", fcntl.flock))
    return calls


def faults(names: list[str]) -> Iterator[Fault]:
    """Yield every error at every call, before and after its effect, once and from then on."""
    for number, name in enumerate(names):
        for error in ERRORS[name]:
            act = _raise(error)
            for when in _moments(name):
                text = f"{error} {when} call {number}, {name}"
                yield Fault(number, name, when, act, text)
                if name in names[number + 1 :]:
                    yield Fault(number, name, when, act, f"lasting {text}", lasts=True)


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


_RANDOM = re.compile(r"[0-9]+-[0-9a-f]{8,16}|-[0-9a-f]{8}(?=\.)")


def state(folder: Path) -> tuple[tuple[str, int, bool, bytes | None], ...]:
    """Describe a folder: equal for two that nothing but random names and recent times tells apart.

    Returns
    -------
    tuple
        Of each file and directory: name, mode, whether it was aged, content.
    """
    found = []
    top = str(folder)
    pending = [top]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                content = None
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    with open(entry.path, "rb") as file:
                        content = file.read()
                name = _RANDOM.sub("*", entry.path[len(top) :])
                found.append((name, status.st_mode, status.st_mtime < 1000, content))
    return tuple(sorted(found, key=lambda one: (one[0], one[1], one[3] or b"")))

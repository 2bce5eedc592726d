"""Records the kernels that a program uses in the file ``JITATTN_RECORD``, one JSON line each.

Any number of processes may append to one file. `jitattn-cache prebuild --spec FILE` compiles
exactly those kernels, with the tiles that the installed version chooses. Lines are written
atomically: writers hold a lock, truncate a line that they could not finish, and start a new line
after one that a killed writer left unfinished. Links of other users are not followed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from typing import TYPE_CHECKING, Final

from jitattn.cache import files, settings
from jitattn.errors import JitAttnError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jitattn.spec.kernel_spec import KernelSpec

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FLAGS: Final = (
    os.O_RDWR
    | os.O_APPEND
    | os.O_CREAT
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would wait for its reader
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_MOST_LINKS: Final = 8
_LOCK_SECONDS: Final = 2.0

_noted: set[tuple[Path, KernelSpec]] = set()


def note(spec: KernelSpec) -> None:
    """Append a kernel to the record, once per process, if recording is on."""
    path = settings.record()
    if path is None or (path, spec) in _noted:
        return
    _noted.add((path, spec))
    try:
        _append(path, json.dumps(spec.to_choice()).encode() + b"\n")
    except (OSError, JitAttnError) as error:
        files.warn_once(path, f"JITATTN_RECORD={path}: it cannot be written ({error})")


def _append(path: Path, line: bytes) -> None:
    """Append a line to a file atomically.

    Raises
    ------
    OSError
        The disk is full, it is no regular file, a link of another user's …
    """
    descriptor = os.open(_target(path), _FLAGS, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        with _lock(descriptor) as is_locked:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if end:
                os.lseek(descriptor, end - 1, os.SEEK_SET)
                if os.read(descriptor, 1) != b"\n":  # a writer was killed in the middle of its line
                    line = b"\n" + line
            try:
                _write(descriptor, line, is_locked)
            except BaseException:
                if is_locked:  # without a lock, another process may have appended
                    os.ftruncate(descriptor, end)
                raise
    finally:
        os.close(descriptor)


def _write(descriptor: int, line: bytes, is_locked: bool) -> None:
    while line:
        count = os.write(descriptor, line)
        line = line[count:]
        if line and (not count or not is_locked):  # without a lock, one write is one line
            raise OSError(errno.ENOSPC, "only a part of a line could be written")


def _target(path: Path) -> Path:
    """Return the file that a path leads to, through links of this user or root only."""
    for _ in range(_MOST_LINKS):
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return path
        if not stat.S_ISLNK(status.st_mode):
            return path
        if files.HAS_OWNERS and status.st_uid not in files.our_owners():
            raise files.UntrustedError(path, f"it is a link of user {status.st_uid}")
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


@contextlib.contextmanager
def _lock(descriptor: int) -> Iterator[bool]:
    """Hold the lock of a file; yield False if locks do not work or another holder is too slow."""
    is_locked = _acquire(descriptor)
    try:
        yield is_locked
    finally:
        if fcntl is not None and is_locked:  # a forked child may share the lock
            with contextlib.suppress(OSError):  # the line is there; closing gives the lock back
                fcntl.flock(descriptor, fcntl.LOCK_UN)


def _acquire(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        except OSError:  # a filesystem without locks
            return False
        else:
            return True
    return False

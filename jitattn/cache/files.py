"""Checks owner and mode of files and directories before they are trusted.

Whoever can write a cubin can run code on the GPU. So a file is read only if nobody but a trusted
owner can have written it: it is opened without following a link, and the open file is checked, not
its name. Windows has no such owners and modes; there a cache is as private as the user's profile,
and the contents are still checked. Writing is in `cache/directory.py`.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_LOG: Final = logging.getLogger("jitattn")
HAS_OWNERS: Final = hasattr(os, "geteuid")
#: Flags of every open: no links are followed, no child process inherits the descriptor.
OPEN_FLAGS: Final = (
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
_NUM_USER_IDS: Final = 0xFFFFFFFF


class UntrustedError(OSError):
    """A file or directory that another user could have written."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(errno.EPERM, reason, str(path))


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes of a file, and a stamp that changes when its name comes to mean another file."""

    data: bytes
    stamp: tuple[int, int, int]


def our_owners() -> frozenset[int]:
    """Return the users whose files are trusted: this one and root. Empty on Windows."""
    return frozenset((0, os.geteuid())) if HAS_OWNERS else frozenset()


def read(path: Path | str, limit: int, owners: Collection[int]) -> Content:
    """Read a regular file of at most `limit` bytes that only `owners` can have written.

    Raises
    ------
    UntrustedError
        It is a link, no regular file, too large, another user's, or others may write to it.
    OSError
        It is not there, or cannot be read.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for its writer.
        flags = os.O_RDONLY | OPEN_FLAGS | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UntrustedError(path, "it is a symbolic link") from error
        raise
    try:
        status = os.fstat(descriptor)
        reason = distrust(status, stat.S_ISREG, owners)
        if reason is None and status.st_size > limit:
            reason = f"it has {status.st_size} bytes, more than {limit}"
        if reason is not None:
            raise UntrustedError(path, reason)
        data = read_all(descriptor, status.st_size)
    finally:
        os.close(descriptor)
    if len(data) != status.st_size:
        raise OSError(errno.EIO, "it was cut short while it was read", str(path))
    return Content(data, stamp(status))


def read_all(descriptor: int, size: int) -> bytes:
    """Read `size` bytes of an open file; fewer only at its end."""
    parts = []
    while size > 0 and (part := os.read(descriptor, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def check_directory(
    path: Path | str, owners: Collection[int], *, may_be_link: bool = False
) -> None:
    """Check that only `owners` can add files to a directory.

    Parameters
    ----------
    may_be_link : bool
        Accept a link of a trusted owner to such a directory: a root that was moved elsewhere.

    Raises
    ------
    UntrustedError
        It is no directory, somebody else's, or others may write to it.
    OSError
        It is not there.
    """
    status = os.lstat(path)
    if may_be_link and is_trusted_link(status, owners):
        status = os.stat(path)
    reason = distrust(status, stat.S_ISDIR, owners)
    if reason is not None:
        raise UntrustedError(path, reason)


def is_trusted_link(status: os.stat_result, owners: Collection[int]) -> bool:
    """Return whether a status is that of a link made by a trusted owner."""
    return (
        stat.S_ISLNK(status.st_mode)
        and status.st_uid in (owners or {0})
        and not _is_nobody(status.st_uid)
    )


def is_among_ours(path: Path) -> bool:
    """Return whether a path, or its nearest existing parent, belongs to this user or to root.

    A process with the home directory of another user (root after ``sudo``) writes nothing there.
    """
    if not HAS_OWNERS:
        return True
    try:
        while not os.path.lexists(path) and path != path.parent:
            path = path.parent
        owner = os.stat(path).st_uid
    except OSError:
        return False
    return owner in our_owners() and not _is_nobody(owner)


def make_parents(folder: Path) -> None:
    """Make a directory and its parents, with access for this user only, whatever the umask.

    Raises
    ------
    OSError
        One cannot be made.
    """
    missing = []
    while not os.path.isdir(folder) and folder != folder.parent:
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        try:
            os.mkdir(one, 0o700)
        except FileExistsError:
            if not os.path.isdir(one):
                raise


def scan(folder: Path | str) -> list[os.DirEntry[str]]:
    """List a directory; empty if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Return a stamp of a file: inode, size and time of change."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def distrust(
    status: os.stat_result, is_kind: Callable[[int], bool], owners: Collection[int]
) -> str | None:
    """Return the reason why a file is not trusted; None if it is trusted."""
    if stat.S_ISLNK(status.st_mode) or _is_junction(status):
        return "it is a symbolic link"
    if not is_kind(status.st_mode):
        return "it is no directory" if is_kind is stat.S_ISDIR else "it is no regular file"
    if not HAS_OWNERS:
        return None
    if _is_nobody(status.st_uid):
        return f"it belongs to user {status.st_uid}, which here stands for every unknown user"
    if status.st_uid not in owners:
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _is_junction(status: os.stat_result) -> bool:
    """Return whether a Windows directory is a junction, which lstat does not report as a link."""
    tag = getattr(status, "st_reparse_tag", 0)
    return tag != 0 and tag in (
        getattr(stat, "IO_REPARSE_TAG_SYMLINK", None),
        getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None),
    )


def _is_nobody(uid: int) -> bool:
    """Return whether a user id is the overflow id, shown for users unknown to a namespace."""
    if sys.platform != "linux" or uid != _overflow_uid():
        return False
    try:
        ranges = Path("/proc/self/uid_map").read_text().splitlines()
    except FileNotFoundError:  # a kernel without namespaces, or no /proc to ask
        return not os.path.isdir("/proc/self")
    except OSError:
        return True
    return sum(int(line.split()[2]) for line in ranges) < _NUM_USER_IDS


@functools.cache
def _overflow_uid() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534


_warned: set[str] = set()
_warned_lock = threading.Lock()


def warn_once(subject: object, message: str) -> None:
    """Log the first message about a subject as a warning, and later ones as information."""
    with _warned_lock:
        is_first = str(subject) not in _warned
        _warned.add(str(subject))
    # The subject is for worker processes, whose warnings their parent gives (`jit/worker.py`).
    level = logging.WARNING if is_first else logging.INFO
    _LOG.log(level, message, extra={"subject": str(subject)})


def _after_fork_in_child() -> None:
    global _warned_lock
    _warned_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

"""Files that may be believed, and files that appear whole or not at all.

Whoever can write a cubin can run code on the GPU. So a file counts only if nobody but a trusted
owner can have written it: it is opened without following a link, and what is checked is the open
file itself, not its name. Windows has no owners and modes of this kind; there a cache is as private
as the user's profile, and the contents are checked all the same.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

_LOG: Final = logging.getLogger("jitattn")
HAS_OWNERS: Final = hasattr(os, "geteuid")
_OPEN_FLAGS: Final = (
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)


class UntrustedError(OSError):
    """Someone else could have written this file or directory."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(errno.EPERM, reason, str(path))


@dataclass(frozen=True, slots=True)
class Content:
    """A file's bytes, and a stamp that tells whether its name still stands for the same file."""

    data: bytes
    stamp: tuple[int, int, int]


def our_owners() -> frozenset[int]:
    """Users whose files this process believes: itself and root. Empty on Windows: not asked."""
    return frozenset((0, os.geteuid())) if HAS_OWNERS else frozenset()


def read(path: Path | str, limit: int, owners: Collection[int]) -> Content:
    """Read a regular file of at most `limit` bytes that only `owners` can have written.

    Raises
    ------
    UntrustedError
        It is a link, no regular file, too big, somebody else's, or others may write to it.
    OSError
        It is not there, or cannot be read.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for its writer.
        flags = os.O_RDONLY | _OPEN_FLAGS | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UntrustedError(path, "it is a symbolic link") from error
        raise
    try:
        status = os.fstat(descriptor)
        reason = _distrust(status, stat.S_ISREG, owners)
        if reason is None and status.st_size > limit:
            reason = f"it has {status.st_size} bytes, more than {limit}"
        if reason is not None:
            raise UntrustedError(path, reason)
        data = os.read(descriptor, status.st_size)
    finally:
        os.close(descriptor)
    if len(data) != status.st_size:
        raise OSError(errno.EIO, "it was cut short while it was read", str(path))
    return Content(data, _stamp(status))


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
    if stat.S_ISLNK(status.st_mode) and may_be_link and status.st_uid in (owners or {0}):
        status = os.stat(path)
    reason = _distrust(status, stat.S_ISDIR, owners)
    if reason is not None:
        raise UntrustedError(path, reason)


def make_directory(path: Path, owners: Collection[int], *, may_be_link: bool = False) -> None:
    """Make a directory for its owner alone, or check the one that is there.

    Raises
    ------
    OSError
        It cannot be made, or cannot be trusted.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    check_directory(path, owners, may_be_link=may_be_link)


def publish(path: Path, content: bytes, temporary: Path) -> None:
    """Write a file whole or not at all, by way of `temporary`, a folder of the same filesystem.

    Raises
    ------
    OSError
        The disk is full, the folder read-only … Nothing is left behind.
    """
    draft = temporary / f"{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def is_unchanged(path: Path, stamp: tuple[int, int, int]) -> bool:
    """Whether a name still stands for the file that was read."""
    try:
        return _stamp(os.lstat(path)) == stamp
    except OSError:
        return False


def scan(folder: Path | str) -> list[os.DirEntry[str]]:
    """Content of a directory; nothing if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _distrust(
    status: os.stat_result, is_kind: Callable[[int], bool], owners: Collection[int]
) -> str | None:
    """Say why something is not to be believed; None if it is."""
    if not is_kind(status.st_mode):
        return "it is a symbolic link" if stat.S_ISLNK(status.st_mode) else "it is of another kind"
    if HAS_OWNERS and status.st_uid not in owners:
        return f"it belongs to user {status.st_uid}"
    if HAS_OWNERS and status.st_mode & 0o022:
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


_warned: set[str] = set()
_warned_lock = threading.Lock()


def warn_once(subject: object, message: str) -> None:
    """Log a warning at the first trouble with a subject, and later ones for those who look."""
    with _warned_lock:
        is_first = str(subject) not in _warned
        _warned.add(str(subject))
    _LOG.log(logging.WARNING if is_first else logging.INFO, message)


def _after_fork_in_child() -> None:
    global _warned_lock
    _warned_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

"""Works in open directories, so that nothing outside them can be made, replaced or deleted.

A path is resolved again at every use: between a check and a deletion, another user may replace a
directory by a link. A `Directory` is checked after it was opened, and every operation in it is
relative to its descriptor, one name at a time, without following links.

Windows has no such calls. There every operation checks by name that the directory is no link or
junction, and then uses the path. That leaves a moment between the two; but there a cache lies in
the user's profile, where only that user and administrators can put a link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from typing import TYPE_CHECKING, Final

from jitattn.cache import files

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path
    from typing import Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Whether names can be resolved relative to an open directory.
HAS_DESCRIPTORS: Final = (
    os.supports_dir_fd >= {os.open, os.mkdir, os.rmdir, os.unlink, os.rename, os.stat, os.utime}
    and os.scandir in os.supports_fd
)
_FLAGS: Final = os.O_RDONLY | files.OPEN_FLAGS | getattr(os, "O_DIRECTORY", 0)
_NO_DIRECTORY: Final = {errno.ELOOP, errno.ENOTDIR, errno.EMLINK}  # EMLINK: a link, on FreeBSD
_POLL_SECONDS: Final = 0.02


class Directory:
    """Open directory that only trusted owners can write to; close it, or use it in a ``with``.

    Parameters
    ----------
    path : str
        Path, for messages; used for access only where `HAS_DESCRIPTORS` is false.
    owners : collection of int
        Users who may own it and its contents.
    descriptor : int or None
        The open directory; None where names cannot be resolved relative to it.
    """

    def __init__(self, path: str, owners: Collection[int], descriptor: int | None) -> None:
        self.path = path
        self._owners = owners
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, owners: Collection[int], *, may_be_link: bool = False) -> Self:
        """Open and check a directory.

        Parameters
        ----------
        may_be_link : bool
            Accept a link of a trusted owner to such a directory: a root that was moved elsewhere.

        Raises
        ------
        UntrustedError
            It is no directory, somebody else's, or others may write to it.
        OSError
            It is not there, or cannot be opened.
        """
        is_link = may_be_link and files.is_trusted_link(os.lstat(path), owners)
        flags = _FLAGS & ~getattr(os, "O_NOFOLLOW", 0) if is_link else _FLAGS
        path_followed = os.path.realpath(path) if is_link else str(path)
        return cls._opened(str(path), path_followed, owners, flags, None, is_checked=True)

    @classmethod
    def _opened(
        cls,
        name: str,
        path: str,
        owners: Collection[int],
        flags: int,
        parent: int | None,
        *,
        is_checked: bool,
    ) -> Self:
        if not HAS_DESCRIPTORS:
            status = os.lstat(path)
            reason = files.distrust(status, stat.S_ISDIR, owners)
            if reason is not None:
                raise files.UntrustedError(path, reason)
            return cls(path, owners, None)
        try:
            descriptor = os.open(name, flags, dir_fd=parent)
        except OSError as error:
            if error.errno in _NO_DIRECTORY:
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
                reason = files.distrust(status, stat.S_ISDIR, owners) or "it cannot be opened"
                raise files.UntrustedError(path, reason) from error
            raise
        with contextlib.ExitStack() as stack:
            stack.callback(_close, descriptor)
            if is_checked:
                reason = files.distrust(os.fstat(descriptor), stat.S_ISDIR, owners)
                if reason is not None:
                    raise files.UntrustedError(path, reason)
            stack.pop_all()
        return cls(path, owners, descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor, which also releases the lock."""
        if self._descriptor is not None:
            _close(self._descriptor)

    def folder(self, name: str, *, make: bool = False, is_checked: bool = True) -> Self:
        """Open a directory in this one, never through a link.

        Parameters
        ----------
        make : bool
            Make it, for this user alone, if it is not there.
        is_checked : bool
            Refuse a directory that belongs to another user or that others may write to. False only
            to read.

        Raises
        ------
        UntrustedError
            It is a link, no directory, or not to be trusted.
        OSError
            It is not there, or cannot be made or opened.
        """
        if make:
            self.make_folder(name)
        path = os.path.join(self.path, name)
        return self._opened(
            self._at(name), path, self._owners, _FLAGS, self._descriptor, is_checked=is_checked
        )

    def make_folder(self, name: str) -> bool:
        """Make a directory for this user alone; False if something of that name is there."""
        try:
            os.mkdir(self._at(name), 0o700, dir_fd=self._descriptor)
        except FileExistsError:
            return False
        return True

    def names(self) -> list[str]:
        """List the names of all entries, sorted."""
        with os.scandir(self._at("") if self._descriptor is None else self._descriptor) as found:
            return sorted(entry.name for entry in found)

    def status(self, name: str) -> os.stat_result:
        """Return the status of a name without following a link."""
        return os.stat(self._at(name), dir_fd=self._descriptor, follow_symlinks=False)

    def unlink(self, name: str) -> None:
        """Delete a file."""
        os.unlink(self._at(name), dir_fd=self._descriptor)

    def rmdir(self, name: str) -> None:
        """Delete an empty directory."""
        os.rmdir(self._at(name), dir_fd=self._descriptor)

    def rename(self, name: str, target: Directory, new_name: str) -> None:
        """Move a file or directory to another directory of the same filesystem."""
        os.rename(
            self._at(name),
            target._at(new_name),
            src_dir_fd=self._descriptor,
            dst_dir_fd=target._descriptor,
        )

    def write_new(self, name: str, content: bytes) -> None:
        """Create a file and write it; delete it again if it cannot be written completely."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | files.OPEN_FLAGS
        try:
            descriptor = os.open(self._at(name), flags, 0o600, dir_fd=self._descriptor)
            try:
                write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except FileExistsError:
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                self.unlink(name)
            raise

    def publish(self, name: str, content: bytes, drafts: Directory) -> None:
        """Write a file atomically: write a draft in another directory, then rename it.

        Raises
        ------
        OSError
            The disk is full, the directory read-only … The draft is deleted.
        """
        draft = f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            drafts.write_new(draft, content)
            os.replace(
                drafts._at(draft),
                self._at(name),
                src_dir_fd=drafts._descriptor,
                dst_dir_fd=self._descriptor,
            )
        except BaseException:
            with contextlib.suppress(OSError):
                drafts.unlink(draft)
            raise

    def take_back(self) -> None:
        """Remove write permission of other users, if this user owns the directory."""
        if self._descriptor is not None and files.HAS_OWNERS:
            status = os.fstat(self._descriptor)
            if status.st_uid == os.geteuid() and status.st_mode & 0o022:
                os.fchmod(self._descriptor, 0o700)

    def lock(self, *, is_shared: bool = False, seconds: float = 0.0) -> bool:
        """Take an advisory lock, held until the directory is closed or this process ends.

        Parameters
        ----------
        is_shared : bool
            Let others hold a shared lock at the same time.
        seconds : float
            How long to wait for others.

        Returns
        -------
        bool
            False if others hold it, or locks do not work here.
        """
        if fcntl is None or self._descriptor is None:
            return False
        deadline = time.monotonic() + seconds
        kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        while True:
            try:
                fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
            except OSError:
                return False
            else:
                return True
            time.sleep(_POLL_SECONDS)

    def _at(self, name: str) -> str:
        """Return a name relative to the descriptor, or else a path that was checked just now."""
        if self._descriptor is not None:
            return name
        reason = files.distrust(os.lstat(self.path), stat.S_ISDIR, self._owners)
        if reason is not None:
            raise files.UntrustedError(self.path, reason)
        return os.path.join(self.path, name)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all bytes, continuing after short writes."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _close(descriptor: int) -> None:
    """Close a descriptor that was only read from; errors are ignored, as no data can be lost."""
    with contextlib.suppress(OSError):
        os.close(descriptor)

"""The user's own cache: a store that is also written, shared by any number of processes.

::

    <root>/CACHEDIR.TAG
    <root>/v1/<k[:2]>/<k[2:]>.{cubin,json}   an entry; the JSON is published last
    <root>/v1/tmp/                           drafts, renamed into place
    <root>/v1/bad/                           damaged entries, set aside for a look
    <root>/v1/lock/                          one file a kernel in the making, no more
    <root>/v1/memo.json                      see `jit/memo.py`
    <root>/imported/<sha256>/                an archive that was imported: a store of its own

Correctness is rename and checksum; the lock only keeps processes from doing the same work. Trouble
with the directory is never an error: the kernel is then kept in memory, and one warning is logged.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import re
import secrets
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs

from jitattn.jit import files, settings
from jitattn.jit.entry import Entry, to_json
from jitattn.jit.store import Bad, Store

if TYPE_CHECKING:
    from collections.abc import Collection

    import filelock

_TEMPORARY: Final = re.compile(r"\d+-[0-9a-f]{16}")
_STALE_SECONDS: Final = 3600  # a draft this old belongs to a writer that died
_TOUCH_SECONDS: Final = 3600  # how exactly the time of last use is known
_KEEP_BAD: Final = 32  # files that were set aside
_FIRST_PAUSE: Final = 0.002  # seconds between two looks while another process compiles
_LAST_PAUSE: Final = 0.05
_TAG: Final = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This directory holds compiled kernels of jitattn. It may be deleted at any time.\n"
)
#: What decides where the cache is.
_ROOT_VARIABLES: Final = (
    "JITATTN_CACHE_DIR",
    "HOME",
    "USERPROFILE",
    "LOCALAPPDATA",
    "XDG_CACHE_HOME",
    "TMPDIR",
)
_LOG: Final = logging.getLogger("jitattn")


class Claim:
    """The right to compile one kernel, held until the end of a ``with``."""

    def __init__(self, lock: filelock.BaseFileLock | None) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.release()


@dataclass(slots=True)
class _Account:
    """What this process knows of the size of a cache: at its last count, and written since."""

    counted: int = -1  #: -1: never counted
    written: int = 0


class DiskCache(Store):
    """The cache directory of this user."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, files.our_owners())
        self._account = _Account()
        self._lock = threading.Lock()

    def read(self, key: str, arch: str, *, is_writable: bool = True) -> Entry | None:
        """Return the entry of `key` if it is right in every respect.

        One that is there but not right is set aside, unless the cache may not be written.
        """
        looked = self.look(key, arch)
        if isinstance(looked, Bad):
            files.warn_once(
                (self.root, "bad"),
                f"a kernel in {self.root} is not to be believed and will be compiled anew "
                f"({key[:16]}: {looked.reason})",
            )
            if is_writable:
                self.set_aside(looked)
            return None
        if looked is not None and is_writable:
            self._touch(key)
        return looked

    def write(self, entry: Entry, in_use: Collection[str] = ()) -> bool:
        """Publish an entry, and make room if the cache has outgrown its limit.

        Parameters
        ----------
        in_use : collection of str
            Keys that may not be evicted.

        Returns
        -------
        bool
            False if the directory does not let us.
        """
        metadata = entry.metadata
        cubin_path, json_path = self.paths(metadata.key)
        text = to_json(metadata)
        try:
            self.make_directories(cubin_path.parent)
            # The JSON comes last: without it, or with another's, the cubin counts for nothing.
            self._publish(cubin_path, entry.cubin)
            self._publish(json_path, text)
        except OSError as error:
            files.warn_once(
                self.root,
                f"the kernel cache {self.root} cannot be written ({error}): kept in memory",
            )
            return False
        self._make_room(len(entry.cubin) + len(text), {metadata.key, *in_use})
        return True

    def claim(self, key: str, arch: str) -> Entry | Claim:
        """Wait for the right to compile `key`, or for another process to have compiled it.

        Waits at most ``JITATTN_LOCK_TIMEOUT`` seconds and then lets the caller compile without the
        lock, as it does where locks do not work: two processes that publish one key publish the
        same bytes.
        """
        import filelock  # 40 ms, and needed only to compile

        deadline = time.monotonic() + settings.lock_timeout()
        pause = _FIRST_PAUSE
        try:
            self.make_directories(self.store / "lock")
            lock = _new_lock(self.store / "lock" / key[:4])
            while True:
                with contextlib.suppress(filelock.Timeout):
                    lock.acquire(blocking=False)
                    break
                if time.monotonic() >= deadline:
                    _LOG.info("the lock of %s is stuck: compiling without it", key[:16])
                    return Claim(None)
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 1.5, _LAST_PAUSE)
                found = self.read(key, arch)
                if found is not None:
                    return found
        except (OSError, NotImplementedError) as error:
            _LOG.info("compiling %s without a lock: %s", key[:16], error)
            return Claim(None)
        claim = Claim(lock)
        found = self.read(key, arch)  # made between our first look and the lock?
        if found is not None:
            with claim:
                return found
        return claim

    def remove(self, key: str) -> bool:
        """Delete an entry; False if it could not be deleted or is not there."""
        cubin_path, json_path = self.paths(key)
        removed = False
        for path in (json_path, cubin_path):
            with contextlib.suppress(OSError):
                path.unlink()
                removed = True
        return removed

    def set_aside(self, bad: Bad) -> bool:
        """Move a bad entry away, unless another process has replaced it meanwhile."""
        folder = self.store / "bad"
        moved = False
        for path, stamp in zip(self.paths(bad.key), bad.stamps, strict=True):
            if stamp is not None and not files.is_unchanged(path, stamp):
                continue
            target = folder / f"{bad.key}-{secrets.token_hex(4)}{path.suffix}"
            with contextlib.suppress(OSError):
                self.make_directories(folder)
                os.rename(path, target)
                moved = True
        return moved

    def clear(self, keys: Collection[str] | None = None) -> int:
        """Delete entries (all, or those of `keys`) and what dead writers left, nothing else.

        Lock files stay: a process that waits on one would not see the next holder.

        Returns
        -------
        int
            How many entries were deleted.
        """
        present = {key for key, _, _ in self.files()}
        doomed = sorted(present if keys is None else present.intersection(keys))
        count = sum(self.remove(key) for key in doomed)
        self.sweep()
        for shard in {key[:2] for key in doomed}:
            with contextlib.suppress(OSError):  # not empty
                (self.store / shard).rmdir()
        self._checked.clear()
        return count

    def sweep(self, keep_bad: int = _KEEP_BAD) -> int:
        """Delete the drafts of dead writers, and all but the newest entries that were set aside."""
        count = 0
        for path in self.leftovers(keep_bad):
            with contextlib.suppress(OSError):
                os.unlink(path)
                count += 1
        return count

    def leftovers(self, keep_bad: int = _KEEP_BAD) -> list[str]:
        """List the files that `sweep` deletes."""
        now = time.time()
        drafts = files.scan(self.store / "tmp")
        doomed = [
            file.path
            for file in drafts
            if _TEMPORARY.fullmatch(file.name) and abs(now - _mtime(file.path)) > _STALE_SECONDS
        ]
        aside = sorted(files.scan(self.store / "bad"), key=lambda file: _mtime(file.path))
        return doomed + [file.path for file in aside[: max(0, len(aside) - keep_bad)]]

    def usage(self) -> dict[str, int]:
        """Bytes that each entry takes on disk, least recently used first.

        A stamp from the future comes from a wrong clock and says nothing: such entries come first,
        and are stamped anew when they are used.
        """
        sizes: dict[str, int] = {}
        used: dict[str, float] = {}
        for key, kind, file in self.files():
            with contextlib.suppress(OSError):
                status = file.stat(follow_symlinks=False)
                sizes[key] = sizes.get(key, 0) + _size(status)
                if kind == "json":
                    used[key] = status.st_mtime
        horizon = time.time() + _TOUCH_SECONDS
        order = sorted(sizes, key=lambda key: _last_use(used.get(key, 0.0), horizon))
        return {key: sizes[key] for key in order}

    def evict(self, limit: int, in_use: Collection[str] = ()) -> list[str]:
        """Delete least recently used entries until the rest takes at most `limit` bytes.

        Returns
        -------
        list of str
            The keys that went. Entries of `in_use` stay.
        """
        sizes = self.usage()
        total = sum(sizes.values())
        gone = []
        for key, size in sizes.items():
            if total <= limit:
                break
            if key in in_use:
                continue
            if self.remove(key):
                gone.append(key)
            elif any(map(os.path.exists, self.paths(key))):
                continue
            total -= size  # another process may have been faster: it is gone all the same
        self._account.counted, self._account.written = total, 0
        return gone

    def make_directories(self, folder: Path) -> None:
        """Make `folder`, inside the store, and everything above it, for this user alone.

        Raises
        ------
        OSError
            It cannot be made, or somebody else could write to what is there.
        """
        self.root.parent.mkdir(parents=True, exist_ok=True)
        files.make_directory(self.root, self.owners, may_be_link=True)
        for path in (self.store, self.store / "tmp", folder):
            files.make_directory(path, self.owners)
        tag = self.root / "CACHEDIR.TAG"
        if not tag.exists():
            self._publish(tag, _TAG.encode())

    def _publish(self, path: Path, content: bytes) -> None:
        try:
            files.publish(path, content, self.store / "tmp")
        except PermissionError:
            # Windows replaces no file that somebody reads; one of this name has these very bytes.
            if files.HAS_OWNERS or not path.is_file():
                raise

    def _touch(self, key: str) -> None:
        """Note that an entry was used, at most once an hour."""
        path, now = self._names(key)[1], time.time()
        with contextlib.suppress(OSError):
            if abs(now - os.stat(path).st_mtime) > _TOUCH_SECONDS:
                os.utime(path, (now, now))

    def _make_room(self, written: int, in_use: Collection[str]) -> None:
        """Count the cache and evict, if what was written since the last count could matter.

        With 64 processes that write as much as this one, the limit would just be reached.
        """
        limit = settings.cache_max_bytes()
        with self._lock:
            account = self._account
            account.written += written
            if account.counted >= 0 and account.written * 64 < limit - account.counted:
                return
            if account.counted < 0:
                self.sweep()
            account.counted, account.written = sum(self.usage().values()), 0
            if account.counted > limit:
                # Down to four fifths, so that this does not happen at every write.
                gone = self.evict(limit * 4 // 5, in_use)
                _LOG.info("%d kernels evicted from %s", len(gone), self.root)


def user_cache() -> DiskCache | None:
    """Return the cache of this user, or None where no directory can be had.

    ``JITATTN_CACHE_DIR``, else the platform's cache directory, else (if that cannot be made) a
    private one among the temporary files. Never the working directory.
    """
    environment = tuple(map(os.environ.get, _ROOT_VARIABLES))
    root = _find_root(environment, *files.our_owners())
    if root is None:
        files.warn_once("root", "no cache directory is to be had: kernels are kept in memory only")
        return None
    return _cache_at(root, *files.our_owners())


@functools.cache
def _cache_at(root: Path, *_owners: int) -> DiskCache:
    return DiskCache(root)


@functools.cache
def _find_root(_environment: object, *_owners: int) -> Path | None:
    return settings.cache_dir() or _home_root() or _temporary_root()


def _home_root() -> Path | None:
    try:
        root = Path(platformdirs.user_cache_dir("jitattn", appauthor=False))
        if not root.is_absolute():
            return None
        if not root.is_dir():
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (RuntimeError, KeyError, OSError):  # no home directory is known, or it is not ours
        return None
    return root


def _temporary_root() -> Path | None:
    if not files.HAS_OWNERS:
        return None
    try:
        folder = Path(tempfile.gettempdir())
        if folder == Path.cwd():  # the last resort of tempfile, not of ours
            return None
        root = folder / f"jitattn-{os.geteuid()}"
        files.make_directory(root, files.our_owners())
    except OSError:
        return None
    return root


def _new_lock(path: Path) -> filelock.BaseFileLock:
    import filelock

    try:
        # A lock by mere existence, its fall-back, would outlive a holder that is killed.
        return filelock.FileLock(path, mode=0o600, fallback_to_soft=False)
    except TypeError:  # an older filelock, which has no such fall-back
        return filelock.FileLock(path, mode=0o600)


def _mtime(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def _size(status: os.stat_result) -> int:
    blocks: int = getattr(status, "st_blocks", 0)
    return blocks * 512 or status.st_size


def _last_use(mtime: float, horizon: float) -> tuple[bool, float]:
    return mtime <= horizon, mtime


if hasattr(os, "register_at_fork"):
    # Another thread of the parent may have held the lock of a cache, which nobody releases here.
    os.register_at_fork(after_in_child=_cache_at.cache_clear)

"""The user's own cache: a store that is also written, by any number of processes at once.

::

    <root>/CACHEDIR.TAG                      if the root was made here; else in v1 and imported
    <root>/v1/<k[:2]>/<k[2:]>.{cubin,json}   an entry; the JSON is published last
    <root>/v1/tmp/                           drafts, renamed into place
    <root>/v1/bad/                           damaged entries, set aside for inspection
    <root>/v1/lock/                          one lock file per kernel that is being compiled
    <root>/v1/memo.json                      see `cache/memo.py`
    <root>/imported/<sha256>/                an imported archive: a store of its own

Atomic renames and checksums give correctness; the lock only prevents duplicate work. A directory
that cannot be used is never an error: kernels are then kept in memory, and one warning is logged.
Files are made, replaced and deleted only in open directories (`cache/directory.py`) that pass the
same checks as for reading, and only files whose names match the cache's patterns are deleted.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import secrets
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jitattn.cache import files, leftovers, location, settings
from jitattn.cache.directory import Directory
from jitattn.cache.entry import Entry, to_json
from jitattn.cache.store import Bad, Store

if TYPE_CHECKING:
    from collections.abc import Collection

    import filelock

_TOUCH_SECONDS: Final = 3600  # resolution of the time of last use
#: Windows cannot change the times of a link itself; entries are never links.
_UTIME_FOLLOWS: Final = os.utime not in os.supports_follow_symlinks
_ATTEMPTS: Final = 8  # to write while another process deletes empty directories
_FIRST_PAUSE: Final = 0.002  # seconds between two looks while another process compiles
_LAST_PAUSE: Final = 0.05
_LOG: Final = logging.getLogger("jitattn")


class Claim:
    """Right to compile one kernel, held until the end of a ``with``."""

    def __init__(self, lock: filelock.BaseFileLock | None) -> None:
        self._lock = lock

    @property
    def holds_lock(self) -> bool:
        """Whether the lock is held; without locks, several processes may compile the kernel."""
        return self._lock is not None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.release()


@dataclass(slots=True)
class _Account:
    """Size of a cache as known to this process: at its last count, and bytes written since."""

    counted: int = -1  #: -1: never counted
    written: int = 0


class DiskCache(Store):
    """Cache directory of this user, read and written."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, files.our_owners())
        self._account = _Account()
        self._lock = threading.Lock()

    def read(self, key: str, arch: str, *, is_writable: bool = True) -> Entry | None:
        """Return the entry of `key` if it passes every check.

        A bad entry is set aside, unless the cache may not be written.
        """
        looked = self.look(key, arch)
        if isinstance(looked, Bad):
            files.warn_once(
                (self.root, "bad"),
                f"a kernel in {self.root} failed its checks and will be compiled again "
                f"({key[:16]}: {looked.reason})",
            )
            if is_writable:
                self.set_aside(looked)
            return None
        if looked is not None and is_writable:
            self._touch(key)
        return looked

    def write(self, entry: Entry, in_use: Collection[str] = ()) -> bool:
        """Publish an entry, and evict others if the cache has outgrown its limit.

        Parameters
        ----------
        in_use : collection of str
            Keys that may not be evicted.

        Returns
        -------
        bool
            False if the directory cannot be written.
        """
        key, text = entry.metadata.key, to_json(entry.metadata)
        try:
            # The JSON comes last: a cubin without matching metadata is not an entry.
            self._publish(key[:2], {f"{key[2:]}.cubin": entry.cubin, f"{key[2:]}.json": text})
        except OSError as error:
            files.warn_once(
                self.root,
                f"the kernel cache {self.root} cannot be written ({error}): kept in memory",
            )
            return False
        self._make_room(len(entry.cubin) + len(text), {key, *in_use})
        return True

    def write_file(self, name: str, content: bytes) -> None:
        """Publish a file that is no entry, in the store.

        Raises
        ------
        OSError
            The directory cannot be written.
        """
        self._publish("", {name: content})

    def claim(self, key: str, arch: str) -> Entry | Claim:
        """Wait for the right to compile `key`, or until another process has compiled it.

        Waits at most ``JITATTN_LOCK_TIMEOUT`` seconds and then lets the caller compile without the
        lock, as it does where locks do not work: two processes that publish one key publish the
        same bytes.
        """
        import filelock  # 40 ms, and needed only to compile

        deadline = time.monotonic() + settings.lock_timeout()
        pause = _FIRST_PAUSE
        try:
            with self.make() as store:
                store.folder("lock", make=True).close()
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
        found = self.read(key, arch)  # it may have been published before the lock was taken
        if found is not None:
            with claim:
                return found
        return claim

    def remove(self, key: str) -> bool | None:
        """Delete an entry; False if a file could not be deleted, None if there is no entry."""
        removed: bool | None = None
        try:
            with self.open() as store, store.folder(key[:2]) as shard:
                for name in (f"{key[2:]}.json", f"{key[2:]}.cubin"):
                    with contextlib.suppress(FileNotFoundError):
                        shard.unlink(name)
                        removed = True
        except FileNotFoundError:
            return removed
        except OSError:
            return False
        return removed

    def set_aside(self, bad: Bad) -> bool:
        """Move a bad entry to ``bad/``, unless another process has replaced it meanwhile."""
        moved = False
        with (
            contextlib.suppress(OSError),
            self.open() as store,
            store.folder(bad.key[:2]) as shard,
            store.folder("bad", make=True) as aside,
        ):
            for path, stamp in zip(self.paths(bad.key), bad.stamps, strict=True):
                with contextlib.suppress(OSError):
                    if stamp is None or files.stamp(shard.status(path.name)) == stamp:
                        new_name = f"{bad.key}-{secrets.token_hex(4)}{path.suffix}"
                        shard.rename(path.name, aside, new_name)
                        moved = True
        return moved

    def clear(self, keys: Collection[str] | None = None) -> int:
        """Delete entries (all, or those of `keys`) and the leftovers of dead writers.

        Returns
        -------
        int
            How many entries were deleted.
        """
        present = {file.key for file in self.files()}
        count = len(self.delete(present if keys is None else present.intersection(keys)))
        self.sweep()
        return count

    def delete(self, keys: Collection[str]) -> set[str]:
        """Delete entries, and directories that become empty.

        Lock files stay: a process that waits on one would not see the next holder.

        Returns
        -------
        set of str
            Keys that were deleted, here or meanwhile by another process. A process that needs one
            may have compiled it again already.
        """
        gone = {key for key in sorted(keys) if self.remove(key) is not False}
        with contextlib.suppress(OSError), self.open() as store:
            for shard in sorted({key[:2] for key in keys}):
                with contextlib.suppress(OSError):  # not empty
                    store.rmdir(shard)
        self._checked.clear()
        return gone

    def sweep(
        self,
        keep_bad: int = leftovers.KEEP_BAD,
        trouble: list[OSError] | None = None,
        *,
        is_dry: bool = False,
    ) -> int:
        """Delete leftovers of dead writers, and all but the newest entries that were set aside.

        Parameters
        ----------
        trouble : list of OSError, optional
            Receives the errors of deletions that failed.
        is_dry : bool
            Only count.

        Returns
        -------
        int
            How many files, and folders of imports, were deleted.
        """
        return leftovers.sweep(self, keep_bad, [] if trouble is None else trouble, is_dry=is_dry)

    def usage(self, trouble: list[OSError] | None = None) -> dict[str, int]:
        """Return the bytes of each entry on disk, least recently used first.

        A time stamp in the future comes from a wrong clock: such entries come first, and get a new
        stamp when they are used. `trouble` receives errors, as in `files`.
        """
        sizes: dict[str, int] = {}
        used: dict[str, float] = {}
        for file in self.files(trouble):
            sizes[file.key] = sizes.get(file.key, 0) + _size(file.status)
            if file.kind == "json":
                used[file.key] = file.status.st_mtime
        horizon = time.time() + _TOUCH_SECONDS
        order = sorted(sizes, key=lambda key: _last_use(used.get(key, 0.0), horizon))
        return {key: sizes[key] for key in order}

    def evict(self, limit: int, in_use: Collection[str] = ()) -> list[str]:
        """Delete least recently used entries until the rest takes at most `limit` bytes.

        Returns
        -------
        list of str
            Keys that were evicted. Entries of `in_use` stay.
        """
        sizes = self.usage()
        total = sum(sizes.values())
        gone = []
        for key, size in sizes.items():
            if total <= limit:
                break
            if key in in_use:
                continue
            removed = self.remove(key)
            if removed is False:
                continue
            if removed:
                gone.append(key)
            total -= size  # also if another process deleted it first
        self._account.counted, self._account.written = total, 0
        return gone

    def open_root(self) -> Directory:
        """Open and check the root.

        Raises
        ------
        OSError
            It is not there, cannot be opened, or cannot be trusted.
        """
        return Directory.open(self.root, self.owners, may_be_link=True)

    def make_root(self) -> Directory:
        """Open the root; create it and its parents with access for this user only.

        Raises
        ------
        OSError
            It cannot be made, or other users could write to it.
        """
        return location.make(self.root, self.owners)

    def check_writable(self) -> None:
        """Write and delete a draft, as every new kernel does.

        Raises
        ------
        OSError
            The directory cannot be made, cannot be written, or others could write to it.
        """
        with self.make() as store, store.folder("tmp", make=True) as drafts:
            name = f"{os.getpid()}-{secrets.token_hex(8)}"
            drafts.write_new(name, b"")
            drafts.unlink(name)

    def make_folder(self, top: Directory, name: str) -> Directory:
        """Open a directory in the root; create and tag it if it does not exist."""
        is_new = top.make_folder(name)
        opened = top.folder(name)
        if is_new:
            location.mark(opened, unless=top)
        return opened

    def make(self) -> Directory:
        """Open the store; create it and its parents as `make_root` does."""
        with self.make_root() as top:
            return self.make_folder(top, self.store.name)

    def _publish(self, folder: str, contents: dict[str, bytes]) -> None:
        """Publish files in a directory of the store; in the store itself if `folder` is empty."""
        for attempt in range(_ATTEMPTS):
            try:
                with contextlib.ExitStack() as stack:
                    store = stack.enter_context(self.make())
                    drafts = stack.enter_context(store.folder("tmp", make=True))
                    if folder:
                        store = stack.enter_context(store.folder(folder, make=True))
                    return self._publish_in(store, contents, drafts)
            except FileNotFoundError:  # another process has just deleted the empty directory
                if attempt == _ATTEMPTS - 1:
                    raise

    def _publish_in(self, folder: Directory, contents: dict[str, bytes], drafts: Directory) -> None:
        for name, content in contents.items():
            try:
                folder.publish(name, content, drafts)
            except PermissionError:
                # Windows does not replace a file that is being read; it has the same bytes anyway.
                if files.HAS_OWNERS or not stat.S_ISREG(folder.status(name).st_mode):
                    raise

    def _touch(self, key: str) -> None:
        """Update the time of last use of an entry, at most once an hour."""
        path, now = self._names(key)[1], time.time()
        with contextlib.suppress(OSError):
            if abs(now - os.lstat(path).st_mtime) > _TOUCH_SECONDS:
                os.utime(path, (now, now), follow_symlinks=_UTIME_FOLLOWS)

    def _make_room(self, written: int, in_use: Collection[str]) -> None:
        """Count and evict, if enough was written since the last count.

        Enough: 64 processes that write as much as this one would reach the limit.
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
                # Down to four fifths of the limit: not every write shall evict.
                gone = self.evict(limit * 4 // 5, in_use)
                _LOG.info("%d kernels evicted from %s", len(gone), self.root)


def user_cache(*, make: bool = True) -> DiskCache | None:
    """Return the cache of this user; None if no directory can be used.

    ``JITATTN_CACHE_DIR``, else the platform's cache directory, else (if that cannot be made) a
    private one among the temporary files. Never the working directory. `make`: see
    `location.find`.
    """
    found = location.find(make=make)
    if found is None:
        files.warn_once("root", "no cache directory is to be had: kernels are kept in memory only")
        return None
    return _cache_at(found, *files.our_owners())


@functools.cache
def _cache_at(root: Path, *_owners: int) -> DiskCache:
    return DiskCache(root)


def _new_lock(path: Path) -> filelock.BaseFileLock:
    import filelock

    try:
        # filelock's fall-back, a lock by existence of a file, would outlive a killed holder.
        return filelock.FileLock(path, mode=0o600, fallback_to_soft=False)
    except TypeError:  # an older filelock, without that fall-back
        return filelock.FileLock(path, mode=0o600)


def _size(status: os.stat_result) -> int:
    blocks: int = getattr(status, "st_blocks", 0)
    return blocks * 512 or status.st_size


def _last_use(mtime: float, horizon: float) -> tuple[bool, float]:
    return mtime <= horizon, mtime


if hasattr(os, "register_at_fork"):
    # A lock that another thread of the parent held is never released in the child.
    os.register_at_fork(after_in_child=_cache_at.cache_clear)

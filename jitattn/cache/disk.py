"""The user's own cache: a store that is also written, shared by any number of processes.

::

    <root>/CACHEDIR.TAG                      if the root was made here; else in v1 and imported
    <root>/v1/<k[:2]>/<k[2:]>.{cubin,json}   an entry; the JSON is published last
    <root>/v1/tmp/                           drafts, renamed into place
    <root>/v1/bad/                           damaged entries, set aside for a look
    <root>/v1/lock/                          one file a kernel in the making, no more
    <root>/v1/memo.json                      see `cache/memo.py`
    <root>/imported/<sha256>/                an archive that was imported: a store of its own

Correctness is rename and checksum; the lock only keeps processes from doing the same work. Trouble
with the directory is never an error: the kernel is then kept in memory, and one warning is logged.
What is made, replaced or deleted lies in directories that are held open (`cache/directory.py`) and
are trusted as a reader trusts them; what is deleted has a name that the cache gave it.
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

_TOUCH_SECONDS: Final = 3600  # how exactly the time of last use is known
#: Windows cannot stamp a link itself; none is stamped anyway.
_UTIME_FOLLOWS: Final = os.utime not in os.supports_follow_symlinks
_ATTEMPTS: Final = 8  # at writing, where another process deletes empty directories meanwhile
_FIRST_PAUSE: Final = 0.002  # seconds between two looks while another process compiles
_LAST_PAUSE: Final = 0.05
_LOG: Final = logging.getLogger("jitattn")


class Claim:
    """The right to compile one kernel, held until the end of a ``with``."""

    def __init__(self, lock: filelock.BaseFileLock | None) -> None:
        self._lock = lock

    @property
    def holds_lock(self) -> bool:
        """Whether other processes wait for this one; where locks do not work, nobody does."""
        return self._lock is not None

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
        key, text = entry.metadata.key, to_json(entry.metadata)
        try:
            # The JSON comes last: without it, or with another's, the cubin counts for nothing.
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
            The directory does not let us.
        """
        self._publish("", {name: content})

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
        found = self.read(key, arch)  # made between our first look and the lock?
        if found is not None:
            with claim:
                return found
        return claim

    def remove(self, key: str) -> bool | None:
        """Delete an entry; False if part of it could not be deleted, None if it is not there."""
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
        """Move a bad entry away, unless another process has replaced it meanwhile."""
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
        """Delete entries (all, or those of `keys`) and what dead writers left, nothing else.

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
        """Delete entries, and directories that are empty then.

        Lock files stay: a process that waits on one would not see the next holder.

        Returns
        -------
        set of str
            The keys that were deleted, here or meanwhile by another process. One of them may be
            there again: a process that needs it makes it anew.
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
        """Delete what dead writers left, and all but the newest entries that were set aside.

        Parameters
        ----------
        trouble : list of OSError, optional
            Takes the reasons why something could not be deleted.
        is_dry : bool
            Only count.

        Returns
        -------
        int
            How many files, and folders of imports, were deleted.
        """
        return leftovers.sweep(self, keep_bad, [] if trouble is None else trouble, is_dry=is_dry)

    def usage(self, trouble: list[OSError] | None = None) -> dict[str, int]:
        """Bytes that each entry takes on disk, least recently used first.

        A stamp from the future comes from a wrong clock and says nothing: such entries come first,
        and are stamped anew when they are used. `trouble` takes errors, as in `files`.
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
            removed = self.remove(key)
            if removed is False:
                continue
            if removed:
                gone.append(key)
            total -= size  # another process may have been faster: it is gone all the same
        self._account.counted, self._account.written = total, 0
        return gone

    def open_root(self) -> Directory:
        """Open the root, checked.

        Raises
        ------
        OSError
            It is not there, cannot be opened, or cannot be trusted.
        """
        return Directory.open(self.root, self.owners, may_be_link=True)

    def make_root(self) -> Directory:
        """Open the root, making it and everything above it for this user alone.

        Raises
        ------
        OSError
            It cannot be made, or somebody else could write to what is there.
        """
        return location.make(self.root, self.owners)

    def make_folder(self, top: Directory, name: str) -> Directory:
        """Open a directory of the cache's own in the root, making it if need be."""
        is_new = top.make_folder(name)
        opened = top.folder(name)
        if is_new:
            location.mark(opened, unless=top)
        return opened

    def make(self) -> Directory:
        """Open the store, making it and everything above it; `make_root` says how."""
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
                # Windows replaces no file that somebody reads; one of this name has these bytes.
                if files.HAS_OWNERS or not stat.S_ISREG(folder.status(name).st_mode):
                    raise

    def _touch(self, key: str) -> None:
        """Note that an entry was used, at most once an hour."""
        path, now = self._names(key)[1], time.time()
        with contextlib.suppress(OSError):
            if abs(now - os.lstat(path).st_mtime) > _TOUCH_SECONDS:
                os.utime(path, (now, now), follow_symlinks=_UTIME_FOLLOWS)

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
    found = location.find()
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
        # A lock by mere existence, its fall-back, would outlive a holder that is killed.
        return filelock.FileLock(path, mode=0o600, fallback_to_soft=False)
    except TypeError:  # an older filelock, which has no such fall-back
        return filelock.FileLock(path, mode=0o600)


def _size(status: os.stat_result) -> int:
    blocks: int = getattr(status, "st_blocks", 0)
    return blocks * 512 or status.st_size


def _last_use(mtime: float, horizon: float) -> tuple[bool, float]:
    return mtime <= horizon, mtime


if hasattr(os, "register_at_fork"):
    # Another thread of the parent may have held the lock of a cache, which nobody releases here.
    os.register_at_fork(after_in_child=_cache_at.cache_clear)

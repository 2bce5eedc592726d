"""Finds and deletes drafts and cubins of dead writers, entries set aside, and imports.

Only names that match the cache's patterns are deleted, only in directories that pass the checks for
reading, and never through a link.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from jitattn.cache.entry import KEY
from jitattn.cache.store import FILE, SHARD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jitattn.cache.directory import Directory
    from jitattn.cache.disk import DiskCache
    from jitattn.cache.store import File

Kind: TypeAlias = Literal["draft", "aside", "import", "orphan"]

#: Directory of the imported archives, each under its digest.
IMPORTED: Final = "imported"
STALE_SECONDS: Final = 3600  #: a draft this old belongs to a writer that died
KEEP_BAD: Final = 32  #: newest files set aside that are kept for inspection
_DRAFT: Final = re.compile(r"[0-9]+-[0-9a-f]{16}")
_ASIDE: Final = re.compile(r"[0-9a-f]{64}-[0-9a-f]{8}\.(?:cubin|json)")
_IMPORT: Final = re.compile(r"\.[0-9a-f]{16}-[0-9]+-[0-9a-f]{8}")
_VERSION: Final = re.compile(r"v[0-9]+")


@dataclass(frozen=True, slots=True)
class Leftover:
    """Draft, file set aside, unfinished import or cubin without metadata.

    It is in use only while its writer runs.
    """

    kind: Kind
    name: str
    changed: float  #: time of its last change
    bytes: int  #: 0 for the folder of an import

    @property
    def is_stale(self) -> bool:
        """Whether it is older than any write takes; a time in the future is a wrong clock's."""
        return abs(time.time() - self.changed) > STALE_SECONDS


def find(cache: DiskCache, trouble: list[OSError]) -> list[Leftover]:
    """List drafts, files set aside and unfinished imports, in use or not, and orphaned cubins."""
    found: list[Leftover] = [
        Leftover("orphan", one.key, one.status.st_mtime, _blocks(one.status))
        for one in cache.orphans(trouble)
    ]
    with noted(trouble), cache.open() as store:
        found += _in_store(store, trouble)
    with noted(trouble), cache.open_root() as root:
        found += _of_imports(root, trouble)
    return found


def sweep(cache: DiskCache, keep_bad: int, trouble: list[OSError], *, is_dry: bool = False) -> int:
    """Delete leftovers of dead writers, and all but the newest files that were set aside."""
    orphans = cache.orphans(trouble)
    count = len(orphans) if is_dry else _delete_orphans(cache, orphans, trouble)
    with noted(trouble), cache.open() as store:
        found = _in_store(store, trouble)
        drafts = [one for one in found if one.kind == "draft" and one.is_stale]
        aside = [one for one in found if one.kind == "aside"]
        doomed = drafts + aside[: max(0, len(aside) - keep_bad)]
        count += len(doomed) if is_dry else _delete_files(store, doomed, trouble)
    with noted(trouble), cache.open_root() as root, root.folder(IMPORTED) as imported:
        # A running import holds the lock. Without locks, age decides.
        are_dead = imported.lock()
        dead = [one for one in _of_imports(root, trouble) if are_dead or one.is_stale]
        for one in dead:
            with noted(trouble):
                count += is_dry or delete_import(imported, one.name)
    return count


def _in_store(store: Directory, trouble: list[OSError]) -> list[Leftover]:
    """List the drafts, then the files that were set aside, oldest first."""
    aside = _listed(store, "bad", "aside", _ASIDE, trouble)
    return [
        *_listed(store, "tmp", "draft", _DRAFT, trouble),
        *sorted(aside, key=lambda one: one.changed),
    ]


def _of_imports(root: Directory, trouble: list[OSError]) -> list[Leftover]:
    return list(_listed(root, IMPORTED, "import", _IMPORT, trouble))


def imports(cache: DiskCache, trouble: list[OSError]) -> list[str]:
    """List the digests of the imported archives."""
    with noted(trouble), cache.open_root() as root, root.folder(IMPORTED) as imported:
        return list(filter(KEY.fullmatch, imported.names()))
    return []


def delete_imports(cache: DiskCache, trouble: list[OSError]) -> int:
    """Delete all imported archives and return how many there were."""
    count = 0
    with noted(trouble), cache.open_root() as root, root.folder(IMPORTED) as imported:
        # The lock marks the renamed folders as in use: `sweep` deletes those of dead imports.
        imported.lock(is_shared=True)
        for digest in filter(KEY.fullmatch, imported.names()):
            with noted(trouble):
                count += _delete_whole(imported, digest)
    return count


def _delete_whole(imported: Directory, digest: str) -> bool:
    """Take an archive out of use by renaming it, and then delete it.

    The name is free at once for a process that imports the archive again.
    """
    imported.folder(digest).close()  # one that is not trusted stays where it is
    name = unfinished(digest)
    try:
        imported.rename(digest, imported, name)
        return delete_import(imported, name)
    except OSError:
        with contextlib.suppress(OSError):  # a rename may take effect and fail all the same
            imported.rename(name, imported, digest)
        raise


def unfinished(digest: str) -> str:
    """Return a new name for the folder of an archive that is being written or deleted."""
    return f".{digest[:16]}-{os.getpid()}-{secrets.token_hex(4)}"


def _delete_files(store: Directory, doomed: list[Leftover], trouble: list[OSError]) -> int:
    """Delete drafts and files that were set aside; return how many there were."""
    count = 0
    for one in doomed:
        with noted(trouble), store.folder("tmp" if one.kind == "draft" else "bad") as folder:
            _delete_file(folder, one.name)
            count += 1
    return count


def _delete_orphans(cache: DiskCache, orphans: list[File], trouble: list[OSError]) -> int:
    """Delete cubins without metadata, unless they have got some meanwhile; return their number."""
    count = 0
    for one in orphans:
        with noted(trouble), cache.open() as store, store.folder(one.key[:2]) as shard:
            if f"{one.key[2:]}.json" not in shard.names():
                shard.unlink(f"{one.key[2:]}.cubin")
                count += 1
    return count


def _blocks(status: os.stat_result) -> int:
    return int(getattr(status, "st_blocks", 0) * 512)


@contextlib.contextmanager
def noted(trouble: list[OSError]) -> Iterator[None]:
    """Collect errors for a report; ignore those about missing files."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        trouble.append(error)


def _delete_file(folder: Directory, name: str) -> None:
    """Delete a file, or an empty directory of that name."""
    if stat.S_ISDIR(folder.status(name).st_mode):
        folder.rmdir(name)
    else:
        folder.unlink(name)


def delete_import(folder: Directory, name: str, *, take_back: bool = False) -> bool:
    """Delete the folder of an archive that is out of use; False if it is gone already.

    Parameters
    ----------
    take_back : bool
        Enter directories of this user that others may write to, after removing that permission.

    Raises
    ------
    OSError
        Part of it cannot be deleted, or is not a file of the cache.
    """
    try:
        if not stat.S_ISDIR(folder.status(name).st_mode):
            folder.unlink(name)
            return True
        with _inner(folder, name, take_back) as top:
            _delete_matching(top, "tmp", _DRAFT, take_back)
            for version in filter(_VERSION.fullmatch, top.names()):
                with _inner(top, version, take_back) as store:
                    _delete_matching(store, "tmp", _DRAFT, take_back)
                    for shard in filter(SHARD.fullmatch, store.names()):
                        _delete_matching(store, shard, FILE, take_back)
                top.rmdir(version)
        folder.rmdir(name)
    except FileNotFoundError:  # another process deletes it as well
        return False
    return True


def _delete_matching(
    parent: Directory, name: str, pattern: re.Pattern[str], take_back: bool
) -> None:
    with contextlib.suppress(FileNotFoundError):
        with _inner(parent, name, take_back) as folder:
            # Metadata first: a cubin without metadata is not an entry.
            for file in sorted(filter(pattern.fullmatch, folder.names()), reverse=True):
                with contextlib.suppress(FileNotFoundError):
                    _delete_file(folder, file)
        parent.rmdir(name)


def _inner(parent: Directory, name: str, take_back: bool) -> Directory:
    if take_back:
        with parent.folder(name, is_checked=False) as folder:
            folder.take_back()
    return parent.folder(name)


def _listed(
    parent: Directory, name: str, kind: Kind, pattern: re.Pattern[str], trouble: list[OSError]
) -> Iterator[Leftover]:
    with noted(trouble), parent.folder(name) as folder:
        for one in filter(pattern.fullmatch, folder.names()):
            with contextlib.suppress(FileNotFoundError):
                status = folder.status(one)
                size = 0 if kind == "import" else _blocks(status)
                yield Leftover(kind, one, status.st_mtime, size)

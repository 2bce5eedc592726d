"""Exports kernels to an archive, one file, and imports it on another machine.

A zip file without compression: ``index.json``, then ``<key>.cubin`` for each kernel, sorted, with a
fixed date, so that the same kernels give the same bytes wherever they were built. Importing makes a
private copy of the archive, checks everything in the copy before anything is written, and adds the
whole archive to the cache at once, as a read-only directory of its own. No path is taken from an
archive. Archives are not signed: their kernels run on the GPU of whoever imports them, and only the
digest identifies the archive that was meant.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import IO, TYPE_CHECKING, Final

from jitattn.cache import leftovers, output, settings, zipped
from jitattn.cache.entry import (
    MAX_CUBIN_BYTES,
    MAX_JSON_BYTES,
    SCHEMA,
    Entry,
    fault,
    from_dict,
    to_json,
)
from jitattn.cache.index import Index
from jitattn.cache.store import Store
from jitattn.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from jitattn.cache.directory import Directory
    from jitattn.cache.disk import DiskCache

_INDEX: Final = "index.json"
_FORMAT: Final = "jitattn kernels"
_FACTS: Final = {"format", "schema", "kernels"}
_MEMBER: Final = re.compile(r"([0-9a-f]{64})\.cubin")
#: Limits of an archive. Export keeps to them too, so that import accepts what export wrote.
MAX_KERNELS: Final = 50_000
MAX_ARCHIVE_BYTES: Final = zipped.MAX_BYTES
_MAX_INDEX_BYTES: Final = 64 * 1024 * 1024
_COPY_IN_MEMORY: Final = 64 * 1024 * 1024
_PIECE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Exported:
    """Summary of an archive that was written."""

    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Imported:
    """Summary of an archive that was imported."""

    count: int
    sha256: str
    folder: Path
    was_there: bool  #: imported before and complete: nothing was written
    was_repaired: bool = False  #: imported before, but files were missing or not trusted


def export(path: Path, entries: Iterable[Entry], *, overwrite: bool = False) -> Exported:
    """Write checked entries to an archive; the file appears whole or not at all.

    Parameters
    ----------
    path : Path
        A new name or, with `overwrite`, a regular file; ``-`` is standard output.

    Raises
    ------
    CacheError
        The file cannot be written, or would be too large.
    """
    chosen = {entry.metadata.key: entry for entry in entries}
    digest, size = _sha256(), 0

    def pieces() -> Iterator[bytes]:
        nonlocal size
        for piece in zipped.chunks(_members(chosen)):
            digest.update(piece)
            size += len(piece)
            yield piece

    output.write(path, pieces(), overwrite=overwrite)
    return Exported(len(chosen), size, digest.hexdigest())


def import_archive(path: Path, cache: DiskCache, *, sha256: str | None = None) -> Imported:
    """Check an archive and add it to a cache, as a read-only directory.

    An archive that was imported before is written again if one of its files is missing, changed or
    no longer trusted.

    Parameters
    ----------
    path : Path
        A regular file, or ``-`` for standard input.
    sha256 : str, optional
        Expected checksum of the file.

    Raises
    ------
    CacheError
        The file cannot be read, is no archive of kernels, holds anything that such an archive does
        not, or has another checksum: nothing was written then. Or the cache cannot be written.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise CacheError(f"sha256 {sha256!r}: it must be 64 hexadecimal digits")
    with tempfile.SpooledTemporaryFile(_COPY_IN_MEMORY) as copy:
        try:
            digest = _copy(path, copy)
            if sha256 is not None and digest != sha256.lower():
                raise CacheError(f"{path} has the sha256 {digest}, not {sha256}: refused")
            archive = _Archive(copy)
            keys = {entry.metadata.key for entry in archive.entries()}
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise CacheError(f"{path} is refused: {reason}") from error
        try:
            return _store(archive, keys, digest, cache)
        except (OSError, ValueError, MemoryError) as error:  # ValueError: the copy was damaged
            raise CacheError(f"{path} cannot be imported into {cache.root}: {error}") from error


def _copy(path: Path, copy: IO[bytes]) -> str:
    """Copy an archive into a private file and return its checksum."""
    digest, size = _sha256(), 0
    for piece in _pieces(path):
        size += len(piece)
        if size > MAX_ARCHIVE_BYTES:
            raise ValueError(f"it has more than {MAX_ARCHIVE_BYTES} bytes")
        digest.update(piece)
        copy.write(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    if path == output.STREAM:
        yield from iter(lambda: sys.stdin.buffer.read(_PIECE), b"")
        return
    # Without O_NONBLOCK, opening a FIFO would wait for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file; - stands for standard input")
        if status.st_size > MAX_ARCHIVE_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, more than {MAX_ARCHIVE_BYTES}")
        yield from iter(lambda: os.read(descriptor, _PIECE), b"")
    finally:
        with contextlib.suppress(OSError):  # nothing was written
            os.close(descriptor)


class _Archive:
    """A private copy of an archive, whose index and sizes are checked when it is opened.

    Raises
    ------
    ValueError
        It is no archive of kernels, or holds anything that such an archive does not.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._members = zipped.Members(file, MAX_KERNELS + 1)
        sizes = self._members.sizes()
        for name, size in sizes.items():
            if name != _INDEX and not _MEMBER.fullmatch(name):
                raise ValueError(f"a member that does not belong here: {name!r}")
            if size > (_MAX_INDEX_BYTES if name == _INDEX else MAX_CUBIN_BYTES):
                raise ValueError(f"{name!r} declares {size} bytes")
        if _INDEX not in sizes:
            raise ValueError(f"it has no {_INDEX}")
        self._names = sizes.keys() - {_INDEX}
        self._index = Index(self._members.read(_INDEX), len(self._names))
        facts = self._index.facts
        if facts.get("format") != _FORMAT:
            raise ValueError("its index is of something else")
        if facts.get("schema") != SCHEMA:
            found = repr(facts.get("schema"))[:40]
            raise ValueError(f"its schema is {found}, this version reads {SCHEMA}")
        if facts.keys() != _FACTS or not isinstance(facts["kernels"], list):
            raise ValueError("its index is damaged")
        if not len(facts["kernels"]) == len(self._index) == len(self._names):
            raise ValueError("its index and its members do not match")

    def entries(self) -> Iterator[Entry]:
        """Read and check the kernels, one after another.

        Raises
        ------
        ValueError
            A kernel does not match its index entry.
        """
        left = set(self._names)
        for raw in self._index.kernels():
            metadata = from_dict(raw)
            if metadata is None or len(to_json(metadata)) > MAX_JSON_BYTES:
                raise ValueError("its index is damaged")
            name = f"{metadata.key}.cubin"
            if name not in left:
                raise ValueError("its index and its members do not match")
            left.remove(name)
            if metadata.key_again() != metadata.key:
                raise ValueError(f"the key {metadata.key[:16]} is not that of what it says it is")
            cubin = self._members.read(name)
            reason = fault(cubin, metadata, metadata.arch)
            if reason is not None:
                raise ValueError(f"kernel {metadata.key[:16]}: {reason}")
            yield Entry(cubin, metadata)


def _store(archive: _Archive, keys: set[str], digest: str, cache: DiskCache) -> Imported:
    folder = cache.root / leftovers.IMPORTED / digest

    def is_whole() -> bool:
        return _is_whole(Store(folder, cache.owners, may_be_link=False), archive, keys)

    with cache.make_root() as root, cache.make_folder(root, leftovers.IMPORTED) as imported:
        # The lock marks the draft as in use: `sweep` deletes the drafts of dead imports.
        imported.lock(is_shared=True, seconds=settings.lock_timeout())
        if is_whole():
            return Imported(len(keys), digest, folder, was_there=True)
        was_repaired = digest in imported.names()
        draft, old = (leftovers.unfinished(digest) for _ in range(2))
        try:
            _write(archive, imported, draft)
            _put_in_place(imported, draft, digest, old, is_whole)
        finally:
            for name in (draft, old):
                # If it cannot be deleted, `prune` finds it and reports the reason.
                with contextlib.suppress(OSError):
                    leftovers.delete_import(imported, name, take_back=True)
    return Imported(len(keys), digest, folder, was_there=False, was_repaired=was_repaired)


def _put_in_place(
    imported: Directory, draft: str, digest: str, old: str, is_whole: Callable[[], bool]
) -> None:
    """Rename a finished draft to its digest; a damaged import of that name is renamed to `old`.

    If another process has imported the same archive meanwhile, its directory is kept.
    """
    try:
        imported.rename(draft, imported, digest)
    except OSError:
        if is_whole():
            return
        with contextlib.suppress(OSError):  # the next rename fails if it is still in the way
            imported.rename(digest, imported, old)
        try:
            imported.rename(draft, imported, digest)
        except OSError:
            with contextlib.suppress(OSError):
                imported.rename(old, imported, digest)
            raise


def _write(archive: _Archive, imported: Directory, name: str) -> None:
    """Write the kernels to a draft directory, which no reader looks into."""
    with (
        imported.folder(name, make=True) as top,
        top.folder("tmp", make=True) as drafts,
        top.folder(f"v{SCHEMA}", make=True) as store,
    ):
        for entry in archive.entries():
            key = entry.metadata.key
            with store.folder(key[:2], make=True) as shard:
                shard.publish(f"{key[2:]}.cubin", entry.cubin, drafts)
                shard.publish(f"{key[2:]}.json", to_json(entry.metadata), drafts)
        top.rmdir("tmp")


def _is_whole(store: Store, archive: _Archive, keys: set[str]) -> bool:
    """Return whether an imported directory is trusted and holds exactly the archive's kernels."""
    return set(store.keys()) == keys and all(
        store.look(entry.metadata.key, entry.metadata.arch) == entry for entry in archive.entries()
    )


def _members(chosen: dict[str, Entry]) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of an archive.

    Raises
    ------
    ValueError
        There are more than an archive may hold.
    """
    index = {
        "format": _FORMAT,
        "schema": SCHEMA,
        # Compile times differ from run to run; without them equal kernels give equal archives.
        "kernels": [
            asdict(replace(chosen[key].metadata, compile_ms=0.0)) for key in sorted(chosen)
        ],
    }
    text = json.dumps(index, indent=1, sort_keys=True).encode()
    if len(chosen) > MAX_KERNELS or len(text) > _MAX_INDEX_BYTES:
        raise ValueError(
            f"{len(chosen)} kernels are more than an archive may hold ({MAX_KERNELS} kernels, "
            f"{_MAX_INDEX_BYTES} bytes of index); choose with --arch, --preset or --spec"
        )
    yield _INDEX, text
    for key in sorted(chosen):
        yield f"{key}.cubin", chosen[key].cubin


def _sha256() -> hashlib._Hash:
    return hashlib.sha256(usedforsecurity=False)

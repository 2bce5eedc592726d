"""Archives of kernels: one file that carries them to another machine.

A zip file without compression: ``index.json``, then ``<key>.cubin`` for each kernel, sorted, with a
fixed date, so that the same kernels give the same bytes wherever they were built. Importing checks
everything before anything is written, and puts the whole archive into the cache at once, as a
read-only directory of its own; nothing in an archive decides about a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import zipfile
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

from jitattn.errors import CacheError
from jitattn.jit import leftovers, settings
from jitattn.jit.entry import (
    MAX_CUBIN_BYTES,
    SCHEMA,
    Entry,
    Metadata,
    fault,
    from_dict,
    to_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from jitattn.jit.cache import DiskCache

_INDEX: Final = "index.json"
_FORMAT: Final = "jitattn kernels"
_MEMBER: Final = re.compile(r"([0-9a-f]{64})\.cubin")
_DATE: Final = (1980, 1, 1, 0, 0, 0)
_MAX_INDEX_BYTES: Final = 256 * 1024 * 1024
_MAX_KERNELS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Exported:
    """What an archive holds."""

    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Imported:
    """What an archive brought."""

    count: int
    sha256: str
    folder: Path
    was_there: bool  #: imported before: nothing was written


def export(path: Path, entries: Iterable[Entry]) -> Exported:
    """Write checked entries to an archive; the file appears whole or not at all.

    Raises
    ------
    CacheError
        The file cannot be written.
    """
    chosen = {entry.metadata.key: entry for entry in entries}
    index = {
        "format": _FORMAT,
        "schema": SCHEMA,
        # How long a compile took differs from run to run, and says nothing about the kernel.
        "kernels": [
            asdict(replace(chosen[key].metadata, compile_ms=0.0)) for key in sorted(chosen)
        ],
    }
    draft = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        try:
            with zipfile.ZipFile(draft, "x", zipfile.ZIP_STORED) as archive:
                archive.writestr(_member(_INDEX), json.dumps(index, indent=1, sort_keys=True))
                for key in sorted(chosen):
                    archive.writestr(_member(f"{key}.cubin"), chosen[key].cubin)
            digest, size = _digest(draft), draft.stat().st_size
            os.replace(draft, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
    except OSError as error:
        raise CacheError(f"the archive {path} cannot be written: {error}") from error
    return Exported(len(chosen), size, digest)


def import_archive(path: Path, cache: DiskCache, *, sha256: str | None = None) -> Imported:
    """Check an archive and add it to a cache, as a read-only directory.

    Parameters
    ----------
    sha256 : str, optional
        What the checksum of the file has to be.

    Raises
    ------
    CacheError
        The file cannot be read, is no archive of kernels, holds anything that such an archive does
        not, or has another checksum. Nothing was written then.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise CacheError(f"sha256 {sha256!r}: it must be 64 hexadecimal digits")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, _sha256).hexdigest()
            if sha256 is not None and digest != sha256.lower():
                raise CacheError(f"{path} has the sha256 {digest}, not {sha256}: refused")
            # The open file is read again, not its name.
            with zipfile.ZipFile(file) as archive:
                kernels = _checked_index(archive, os.fstat(file.fileno()).st_size)
                for _ in _checked_entries(archive, kernels):
                    pass
                return _write(archive, kernels, digest, cache)
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, RecursionError) as error:
        raise CacheError(f"{path} is refused: {error}") from error


def _write(
    archive: zipfile.ZipFile, kernels: list[Metadata], digest: str, cache: DiskCache
) -> Imported:
    target = cache.root / "imported" / digest
    if target.is_dir():
        return Imported(len(kernels), digest, target, was_there=True)
    with cache.make_root() as root, cache.make_folder(root, leftovers.IMPORTED) as imported:
        imported.lock(is_shared=True, seconds=settings.lock_timeout())
        draft = leftovers.unfinished(digest)
        try:
            with (
                imported.folder(draft, make=True) as top,
                top.folder("tmp", make=True) as drafts,
                top.folder(f"v{SCHEMA}", make=True) as store,
            ):
                for entry in _checked_entries(archive, kernels):
                    key = entry.metadata.key
                    with store.folder(key[:2], make=True) as shard:
                        shard.publish(f"{key[2:]}.cubin", entry.cubin, drafts)
                        shard.publish(f"{key[2:]}.json", to_json(entry.metadata), drafts)
                top.rmdir("tmp")
            try:
                imported.rename(draft, imported, digest)
            except OSError:
                if not target.is_dir():  # else another process imported the same archive
                    raise
        finally:
            with contextlib.suppress(OSError):
                leftovers.delete_import(imported, draft)
    return Imported(len(kernels), digest, target, was_there=False)


def _checked_index(archive: zipfile.ZipFile, file_size: int) -> list[Metadata]:
    """Check the list of members and the index against each other; returns the metadata."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) != len(names) or len(names) > _MAX_KERNELS + 1:
        raise ValueError("a member occurs twice, or there are too many")
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)
        if member.filename != _INDEX and not _MEMBER.fullmatch(member.filename):
            raise ValueError(f"a member that does not belong here: {member.filename!r}")
        if kind not in (0, stat.S_IFREG):
            raise ValueError(f"{member.filename!r} is no plain file")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"{member.filename!r} is compressed or encrypted")
        limit = _MAX_INDEX_BYTES if member.filename == _INDEX else MAX_CUBIN_BYTES
        if member.file_size != member.compress_size or member.file_size > min(limit, file_size):
            raise ValueError(f"{member.filename!r} declares {member.file_size} bytes")
    if _INDEX not in names:
        raise ValueError(f"it has no {_INDEX}")
    index = json.loads(archive.read(_INDEX))
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ValueError("its index is of something else")
    if index.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {index.get('schema')!r}, this version reads {SCHEMA}")
    listed = index.get("kernels")
    kernels = [from_dict(one) for one in listed] if isinstance(listed, list) else [None]
    good = [kernel for kernel in kernels if kernel is not None]
    if len(good) != len(kernels):
        raise ValueError("its index is damaged")
    keys = [kernel.key for kernel in good]
    if sorted(f"{key}.cubin" for key in keys) != sorted(set(names) - {_INDEX}):
        raise ValueError("its index and its members do not match")
    for kernel in good:
        if kernel.key_again() != kernel.key:
            raise ValueError(f"the key {kernel.key[:16]} is not that of what it says it is")
    return good


def _checked_entries(archive: zipfile.ZipFile, kernels: list[Metadata]) -> Iterator[Entry]:
    for kernel in kernels:
        cubin = archive.read(f"{kernel.key}.cubin")
        reason = fault(cubin, kernel, kernel.arch)
        if reason is not None:
            raise ValueError(f"kernel {kernel.key[:16]}: {reason}")
        yield Entry(cubin, kernel)


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, _DATE)
    member.create_system = 3  # the same bytes on Windows
    member.external_attr = (stat.S_IFREG | 0o600) << 16
    return member


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _sha256).hexdigest()


def _sha256() -> hashlib._Hash:
    return hashlib.sha256(usedforsecurity=False)

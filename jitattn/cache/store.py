"""Reads a directory of kernels: `<key>.cubin` beside `<key>.json`.

::

    <root>/v1/<k[:2]>/<k[2:]>.cubin   the plain cubin: cuobjdump and nvdisasm open it
    <root>/v1/<k[:2]>/<k[2:]>.json    metadata with size and sha256 of the cubin

A damaged cubin crashes the process inside the driver, so an entry is used only if it passes every
check, and the bytes that were checked are the bytes that are loaded. `Store` only reads; the user's
own cache, which is also written, is in `cache/disk.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jitattn.cache import files
from jitattn.cache.directory import Directory
from jitattn.cache.entry import (
    KERNEL_DIGITS,
    MAX_CUBIN_BYTES,
    MAX_JSON_BYTES,
    SCHEMA,
    Entry,
    Metadata,
    fault,
    from_json,
)
from jitattn.spec.text import version_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

#: Between publishing a cubin and its metadata, a writer takes less.
ORPHAN_SECONDS: Final = 60
SHARD: Final = re.compile(r"[0-9a-f]{2}")
FILE: Final = re.compile(r"([0-9a-f]{62})\.(json|cubin)")


@dataclass(frozen=True, slots=True)
class Bad:
    """Entry that exists but failed a check."""

    key: str
    reason: str
    #: Stamps (inode, size, mtime) of cubin and metadata when they were read; None if not read.
    stamps: tuple[tuple[int, int, int] | None, tuple[int, int, int] | None]


@dataclass(frozen=True, slots=True)
class File:
    """One of the two files of an entry."""

    key: str
    kind: str  #: "json" or "cubin"
    status: os.stat_result

    @property
    def is_old(self) -> bool:
        """Whether no writer is at it; a time in the future is a wrong clock's."""
        return abs(time.time() - self.status.st_mtime) > ORPHAN_SECONDS


class Store:
    """Reader of one directory of kernels.

    Parameters
    ----------
    root : Path
    owners : collection of int
        Users who may own the directory and its files.
    may_be_link : bool
        Accept a link of a trusted owner as the root.
    """

    def __init__(self, root: Path, owners: Collection[int], *, may_be_link: bool = True) -> None:
        self.root = root
        self._may_be_link = may_be_link
        self.store = root / f"v{SCHEMA}"
        self.owners = owners
        self._prefix = f"{self.store}{os.sep}"
        self._checked: set[str] = set()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r})"

    def look(self, key: str, arch: str) -> Entry | Bad | None:
        """Return the entry of `key` if it passes all checks, else `Bad`; None if there is none."""
        cubin_name, json_name = self._names(key)
        json_stamp = None
        try:
            if not self.is_trusted(key[:2]):
                return None
            text = files.read(json_name, MAX_JSON_BYTES, self.owners)
            json_stamp = text.stamp
            metadata = from_json(text.data)
            if metadata is None or metadata.key != key:
                return Bad(key, "the metadata is damaged, or of another entry", (None, json_stamp))
            cubin = files.read(cubin_name, MAX_CUBIN_BYTES, self.owners)
        except (FileNotFoundError, NotADirectoryError):
            return None  # no entry, or an entry that is being written or deleted
        except files.UntrustedError as error:
            return Bad(key, f"{error.filename}: {error.strerror}", (None, json_stamp))
        except OSError as error:
            files.warn_once(self.root, f"the kernel cache {self.root} cannot be read ({error})")
            return None
        reason = fault(cubin.data, metadata, arch)
        if reason is not None:
            return Bad(key, reason, (cubin.stamp, json_stamp))
        return Entry(cubin.data, metadata)

    def look_for_kernel(
        self, key: str, arch: str, is_usable: Callable[[str], bool] = lambda _: True
    ) -> Iterator[Entry | Bad]:
        """Yield the entries of a kernel from all compilers, newest compiler first.

        A cubin is read only when it is yielded, and only if `is_usable(compiler)`.
        """
        kernel = key[2:KERNEL_DIGITS]
        found: list[tuple[tuple[int, ...], str]] = []
        for file in files.scan(self.store / key[:2]):
            match = FILE.fullmatch(file.name)
            if match is None or match[2] != "json" or not match[1].startswith(kernel):
                continue
            made = key[:2] + match[1]
            toolchain = self._toolchain(made)
            if toolchain is None or is_usable(toolchain):
                found.append((version_numbers(toolchain or ""), made))
        for _, made in sorted(found, key=_newest_first):
            looked = self.look(made, arch)
            if looked is not None:
                yield looked

    def _toolchain(self, key: str) -> str | None:
        """Return the compiler in an entry's metadata; None if unreadable, which `look` reports."""
        metadata = self._metadata(key)
        return None if metadata is None else metadata.toolchain

    def keys(self) -> list[str]:
        """List the keys of all entries, bad ones included, sorted."""
        return sorted({file.key for file in self.files() if file.kind == "json"})

    def entries(self) -> Iterator[Metadata]:
        """Yield the metadata of all entries, sorted by key; cubins are not read."""
        for key in self.keys():
            metadata = self._metadata(key)
            if metadata is not None:
                yield metadata

    def _metadata(self, key: str) -> Metadata | None:
        """Return the metadata of an entry; None if it cannot be read or is damaged."""
        try:
            text = files.read(self._names(key)[1], MAX_JSON_BYTES, self.owners)
        except OSError:
            return None
        metadata = from_json(text.data)
        return metadata if metadata is not None and metadata.key == key else None

    def files(self, trouble: list[OSError] | None = None) -> Iterator[File]:
        """Yield the files of all entries; follows no links.

        Parameters
        ----------
        trouble : list of OSError, optional
            Receives the errors of existing directories that cannot be listed.
        """
        trouble = [] if trouble is None else trouble
        try:
            with self.open() as store:
                for shard in filter(SHARD.fullmatch, store.names()):
                    try:
                        yield from _files_of(store, shard)
                    except files.UntrustedError:  # a link or file, not made by the cache
                        continue
                    except OSError as error:
                        _note(error, trouble)
        except OSError as error:
            _note(error, trouble)

    def orphans(self, trouble: list[OSError] | None = None) -> list[File]:
        """List cubins without metadata, of writers that died or metadata that was deleted.

        They are no entries, and nothing reads them. `trouble` receives errors, as in `files`.
        """
        found = list(self.files(trouble))
        known = {file.key for file in found if file.kind == "json"}
        return [file for file in found if file.key not in known and file.is_old]

    def open(self) -> Directory:
        """Open the store; check it and the root.

        Raises
        ------
        OSError
            It is not there, cannot be opened, or cannot be trusted.
        """
        with Directory.open(self.root, self.owners, may_be_link=self._may_be_link) as root:
            return root.folder(self.store.name)

    def paths(self, key: str) -> tuple[Path, Path]:
        """Return the paths of the cubin and the metadata of `key`, existing or not."""
        cubin, metadata = self._names(key)
        return Path(cubin), Path(metadata)

    def _names(self, key: str) -> tuple[str, str]:
        """Build the two paths as text, which takes less of a cache hit's time than `Path`."""
        base = f"{self._prefix}{key[:2]}{os.sep}{key[2:]}"
        return f"{base}.cubin", f"{base}.json"

    def is_trusted(self, shard: str = "") -> bool:
        """Check, once per process, that only owners can write to the store or a directory in it.

        Raises
        ------
        OSError
            It is not there.
        """
        if shard in self._checked:
            return True
        try:
            if "" not in self._checked:
                files.check_directory(self.root, self.owners, may_be_link=self._may_be_link)
                files.check_directory(self.store, self.owners)
                self._checked.add("")
            if shard:
                files.check_directory(f"{self._prefix}{shard}", self.owners)
        except files.UntrustedError as error:
            files.warn_once(
                self.root,
                f"the kernel cache {self.root} is not used: {error.filename}: {error.strerror}",
            )
            return False
        self._checked.add(shard)
        return True


def _files_of(store: Directory, shard: str) -> list[File]:
    found = []
    # A directory that others can write to is listed too: reading and deleting check it.
    with store.folder(shard, is_checked=False) as folder:
        for name in folder.names():
            match = FILE.fullmatch(name)
            if match is not None:
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    found.append(File(shard + match[1], match[2], folder.status(name)))
    return found


def _note(error: OSError, trouble: list[OSError]) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        trouble.append(error)


def _newest_first(found: tuple[tuple[int, ...], str]) -> tuple[tuple[int, ...], str]:
    version, key = found
    return tuple(-part for part in version) or (0,), key  # unreadable versions come last

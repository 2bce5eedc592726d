"""Finds, checks and names the cache entries that commands work on, in all directories."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jitattn.cache import files
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import MAX_CUBIN_BYTES, MAX_JSON_BYTES, Entry, Metadata, from_json
from jitattn.cache.store import Bad, Store
from jitattn.cli.common import fail, own_cache, warn
from jitattn.errors import CacheError
from jitattn.jit.layers import imported, layers

_SHORTEST_KEY = 4


@dataclass(frozen=True, slots=True)
class Found:
    """Metadata of an entry, and the directory that holds it."""

    metadata: Metadata
    store: Store
    where: str  #: "user", "imported", or the directory


def named_stores(cache: DiskCache) -> list[tuple[str, Store]]:
    """Return the user's cache and the read-only directories, with display names."""
    brought = {store.root for store in imported(cache)}
    others = [
        ("imported" if store.root in brought else str(store.root), store) for store in layers(cache)
    ]
    return [("user", cache), *others]


def all_entries(cache: DiskCache) -> list[Found]:
    """Return all entries with readable metadata, those of the user's cache first."""
    return [
        Found(metadata, store, where)
        for where, store in named_stores(cache)
        if is_trusted(store)
        for metadata in store.entries()
    ]


def is_trusted(store: Store) -> bool:
    """Return whether a directory of kernels exists and is trusted; warn if it is not trusted."""
    reason = distrust(store)
    if reason is not None:
        warn(f"{store.root} is not used: {reason}")
    return reason is None and store.store.is_dir()


def trusted_cache(*, to_write: bool) -> DiskCache:
    """Return the user's cache for deleting; exit if it is not trusted."""
    cache = own_cache(to_write=to_write)
    reason = distrust(cache)
    if reason is not None:
        fail(f"nothing is deleted in {cache.root}: {reason}")
    return cache


def distrust(store: Store) -> str | None:
    """Return the reason why a directory is not trusted; None if it is trusted or missing."""
    try:
        for folder in (store.root, store.store):
            files.check_directory(folder, store.owners, may_be_link=folder == store.root)
        with os.scandir(store.store):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def check(store: Store, key: str) -> Entry | Bad | None:
    """Run all checks of an entry, its key included; None only if it no longer exists.

    For `Store.look`, an unreadable entry does not exist; here the reason is reported.
    """
    cubin_path, json_path = store.paths(key)
    metadata = metadata_of(store, key)
    looked = store.look(key, "" if metadata is None else metadata.arch)
    if isinstance(looked, Entry) and looked.metadata.key_again() != key:
        return Bad(key, "its key is not that of what it says it is", (None, None))
    if looked is not None or not os.path.lexists(json_path):
        return looked
    try:
        files.check_directory(cubin_path.parent, store.owners)
        files.read(json_path, MAX_JSON_BYTES, store.owners)
        files.read(cubin_path, MAX_CUBIN_BYTES, store.owners)
    except OSError as error:
        return Bad(key, f"{error.filename}: {error.strerror}", (None, None))
    return store.look(key, "" if metadata is None else metadata.arch)  # just written


def metadata_of(store: Store, key: str) -> Metadata | None:
    """Return the metadata of an entry; None if it cannot be read."""
    try:
        return from_json(files.read(store.paths(key)[1], MAX_JSON_BYTES, store.owners).data)
    except OSError:
        return None


def find_by_key(cache: DiskCache, key: str) -> Found:
    """Return the entry whose key begins with a prefix.

    Raises
    ------
    CacheError
        There is none, or there are several.
    """
    text = key.lower()
    if len(text) < _SHORTEST_KEY or not set(text) <= set("0123456789abcdef"):
        raise CacheError(f"key {key!r}: give at least {_SHORTEST_KEY} of its hexadecimal digits")
    found = [one for one in all_entries(cache) if one.metadata.key.startswith(text)]
    keys = sorted({one.metadata.key for one in found})
    if not keys:
        raise CacheError(f"no kernel's key begins with {key}; see jitattn-cache list")
    if len(keys) > 1:
        candidates = ", ".join(one[:16] for one in keys[:8])
        raise CacheError(f"{len(keys)} keys begin with {key}: {candidates}; give more digits")
    return found[0]

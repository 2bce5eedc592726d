"""What the commands work on: the entries of every directory, found, checked, and named by a key."""

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
    """An entry, by its metadata, and where it lies."""

    metadata: Metadata
    store: Store
    where: str  #: "user", "imported", or the directory


def named_stores(cache: DiskCache) -> list[tuple[str, Store]]:
    """Return the user's cache and the read-only directories, each with what to call it."""
    brought = {store.root for store in imported(cache)}
    others = [
        ("imported" if store.root in brought else str(store.root), store) for store in layers(cache)
    ]
    return [("user", cache), *others]


def all_entries(cache: DiskCache) -> list[Found]:
    """Return every entry whose metadata can be read, those of the user first."""
    return [
        Found(metadata, store, where)
        for where, store in named_stores(cache)
        if is_trusted(store)
        for metadata in store.entries()
    ]


def is_trusted(store: Store) -> bool:
    """Whether a directory of kernels is there and only its owner can write to it; says why not."""
    reason = distrust(store)
    if reason is not None:
        warn(f"{store.root} is not used: {reason}")
    return reason is None and store.store.is_dir()


def trusted_cache(*, to_write: bool) -> DiskCache:
    """Return the user's cache to delete in, or end the command if it is not to be trusted."""
    cache = own_cache(to_write=to_write)
    reason = distrust(cache)
    if reason is not None:
        fail(f"nothing is deleted in {cache.root}: {reason}")
    return cache


def distrust(store: Store) -> str | None:
    """Say why a directory of kernels is not used; None if it is, or is not there at all."""
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
    """Check an entry in every respect, its key included; None only if it is not there any more.

    A reader takes an entry that it cannot or may not read for none; here the reason is wanted.
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
    """Return what an entry says of itself; None if that cannot be read."""
    try:
        return from_json(files.read(store.paths(key)[1], MAX_JSON_BYTES, store.owners).data)
    except OSError:
        return None


def find_by_key(cache: DiskCache, key: str) -> Found:
    """Return the entry whose key begins so.

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

"""Facts about installed files that are dear to find, remembered on disk between processes.

The digest of the templates and the version of NVRTC take milliseconds to find, in every process
anew. A fact is kept with the signature of the files that it follows from (inode, size, times of
change, which no copy or reinstallation leaves alone) and counts only while that signature is true.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Final, TypeAlias

from jitattn.jit import files, settings
from jitattn.jit.cache import user_cache
from jitattn.jit.entry import MAX_JSON_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from jitattn.jit.cache import DiskCache

#: What a signature is made of, a file or directory: path, inode, size, times of change in ns.
Signature: TypeAlias = list[list[str | int]]
_MAX_FACTS: Final = 64

_loaded: dict[Path, dict[str, list[object]]] = {}


def signature(paths: Iterable[str | Path]) -> Signature:
    """Describe files and directories so that any change of one changes the description."""
    described: Signature = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            described.append([str(path)])
            continue
        described.append(
            [str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        )
    return described


def recall(name: str) -> tuple[Signature, object] | None:
    """Return a remembered fact with the signature that it was found under; None if there is none.

    The caller compares the signature with that of today.
    """
    cache = _cache()
    fact = None if cache is None else _facts(cache).get(name)
    if fact is None or len(fact) != 2 or not isinstance(fact[0], list):
        return None
    return fact[0], fact[1]


def remember(name: str, signature: Signature, value: object) -> None:
    """Keep a fact for later processes, if the cache may be written."""
    cache = _cache()
    if cache is None or settings.cache_mode() != "rw":
        return
    facts = _facts(cache)
    facts.pop(name, None)
    while len(facts) >= _MAX_FACTS:
        del facts[next(iter(facts))]
    facts[name] = [signature, value]
    # Trouble is no news here: a kernel that cannot be written will say so.
    with contextlib.suppress(OSError):
        cache.write_file(_path(cache).name, json.dumps(facts).encode())


def _cache() -> DiskCache | None:
    return None if settings.cache_mode() == "off" else user_cache()


def _path(cache: DiskCache) -> Path:
    return cache.store / "memo.json"


def _facts(cache: DiskCache) -> dict[str, list[object]]:
    facts = _loaded.get(cache.root)
    if facts is None:
        facts, raw = {}, None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if cache.is_trusted():
                raw = json.loads(files.read(_path(cache), MAX_JSON_BYTES, cache.owners).data)
            if isinstance(raw, dict):
                facts = {name: fact for name, fact in raw.items() if isinstance(fact, list)}
        _loaded[cache.root] = facts
    return facts

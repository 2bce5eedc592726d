"""Facts about installed files that are dear to find, remembered on disk between processes.

The digest of the templates and the version of NVRTC take milliseconds to find, in every process
anew. A fact is kept with the signature of the files that it follows from (inode, size, times of
change, which no copy or reinstallation leaves alone) and counts only while that signature is true.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeGuard

from jitattn.cache import files, settings
from jitattn.cache.disk import user_cache
from jitattn.cache.entry import MAX_JSON_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from jitattn.cache.disk import DiskCache

#: What a signature is made of, a file or directory: path, inode, size, times of change in ns.
Signature: TypeAlias = list[list[str | int]]
_Fact: TypeAlias = tuple[Signature, object]
_MAX_FACTS: Final = 64

_loaded: dict[Path, dict[str, _Fact]] = {}


def signature(paths: Iterable[str | Path]) -> Signature:
    """Describe files and directories so that any change of one changes the description."""
    described: Signature = []
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # not there; or no name that a file can have
            described.append([str(path)])
            continue
        described.append(
            [str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        )
    return described


def recall(name: str) -> _Fact | None:
    """Return a remembered fact with the signature that it was found under; None if there is none.

    The caller compares the signature with that of today, and checks that the fact is of its kind.
    """
    cache = _cache()
    return None if cache is None else _facts(cache).get(name)


def remember(name: str, signature: Signature, value: object) -> None:
    """Keep a fact for later processes, if the cache may be written."""
    cache = _cache()
    if cache is None or settings.cache_mode() != "rw":
        return
    facts = _facts(cache)
    facts.pop(name, None)
    while len(facts) >= _MAX_FACTS:
        del facts[next(iter(facts))]
    facts[name] = (signature, value)
    # Trouble is no news here: a kernel that cannot be written will say so. RecursionError: of
    # another fact in the file, which could just be read.
    with contextlib.suppress(OSError, RecursionError):
        cache.write_file(_path(cache).name, json.dumps(facts).encode())


def _cache() -> DiskCache | None:
    return None if settings.cache_mode() == "off" else user_cache()


def _path(cache: DiskCache) -> Path:
    return cache.store / "memo.json"


def _facts(cache: DiskCache) -> dict[str, _Fact]:
    facts = _loaded.get(cache.root)
    if facts is None:
        raw = None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if cache.is_trusted():
                raw = json.loads(files.read(_path(cache), MAX_JSON_BYTES, cache.owners).data)
        found = raw.items() if type(raw) is dict else ()
        facts = {name: (fact[0], fact[1]) for name, fact in found if _is_fact(fact)}
        _loaded[cache.root] = facts
    return facts


def _is_fact(raw: Any) -> TypeGuard[list[Any]]:  # noqa: ANN401 - anything that JSON can hold
    """Whether a JSON value is a signature with a value, each of them usable as it is."""
    return (
        type(raw) is list and len(raw) == 2 and type(raw[0]) is list and all(map(_is_file, raw[0]))
    )


def _is_file(raw: Any) -> bool:  # noqa: ANN401 - anything that JSON can hold
    """Whether a JSON value describes a file as `signature` does."""
    if type(raw) is not list or not raw or type(raw[0]) is not str:
        return False
    return all(type(number) is int for number in raw[1:])

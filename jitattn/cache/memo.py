"""Memoizes on disk facts about installed files that are expensive to compute.

The digest of the templates and the version of NVRTC take milliseconds to compute in every process.
A fact is stored with a signature of the files that it depends on (inode, size, times of change,
which any copy or reinstallation changes) and is valid only while that signature holds.
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

#: For each file or directory: path, inode, size, times of change in ns.
Signature: TypeAlias = list[list[str | int]]
_Fact: TypeAlias = tuple[Signature, object]
_MAX_FACTS: Final = 64

_loaded: dict[Path, dict[str, _Fact]] = {}


def signature(paths: Iterable[str | Path]) -> Signature:
    """Return a signature of files and directories, which any change of one of them changes."""
    described: Signature = []
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # missing, or not a valid file name
            described.append([str(path)])
            continue
        described.append(
            [str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        )
    return described


def recall(name: str) -> _Fact | None:
    """Return a fact with the signature it was stored with; None if there is none.

    The caller compares the signature with the current one, and checks the type of the fact.
    """
    cache = _cache()
    return None if cache is None else _facts(cache).get(name)


def remember(name: str, signature: Signature, value: object) -> None:
    """Store a fact for later processes, if the cache may be written."""
    cache = _cache()
    if cache is None or settings.cache_mode() != "rw":
        return
    facts = _facts(cache)
    facts.pop(name, None)
    while len(facts) >= _MAX_FACTS:
        del facts[next(iter(facts))]
    facts[name] = (signature, value)
    # Errors are ignored: writing a kernel will report them. RecursionError: another fact in the
    # file is nested so deeply that it could just be read.
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
    """Return whether a JSON value is a pair of a valid signature and a value."""
    return (
        type(raw) is list and len(raw) == 2 and type(raw[0]) is list and all(map(_is_file, raw[0]))
    )


def _is_file(raw: Any) -> bool:  # noqa: ANN401 - anything that JSON can hold
    """Return whether a JSON value describes a file as `signature` does."""
    if type(raw) is not list or not raw or type(raw[0]) is not str:
        return False
    return all(type(number) is int for number in raw[1:])

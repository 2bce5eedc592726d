"""Commands that check and delete: verify, prune, clear."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from typing import Any

import click

from jitattn.cli.common import (
    Archs,
    confirm,
    describe,
    emit,
    is_trusted,
    json_option,
    named_stores,
    own_cache,
    progress,
    yes_option,
)
from jitattn.errors import CompileError, JitAttnError
from jitattn.jit import build, compilers, nvrtc, sources
from jitattn.jit.cache import DiskCache
from jitattn.jit.codegen import render
from jitattn.jit.entry import MAX_JSON_BYTES, Entry, Metadata, from_json, sha256
from jitattn.jit.files import read
from jitattn.jit.layers import imported
from jitattn.jit.spec import spec_from_dict
from jitattn.jit.store import Bad, Store

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZES = {"": 0, "K": 10, "M": 20, "G": 30}


class _Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:  # noqa: ANN401 - click's
        match = re.fullmatch(r"(\d{1,9})([smhdw])", str(value))
        if match is None:
            self.fail(f"{value!r}: it must be a number and a unit, as in 30d (s, m, h, d, w)")
        return int(match[1]) * _UNITS[match[2]]


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:  # noqa: ANN401 - click's
        match = re.fullmatch(r"(\d{1,15})([KMG]?)", str(value).upper())
        if match is None:
            self.fail(f"{value!r}: it must be a number of bytes, as in 100000 or 100M")
        return int(match[1]) << _SIZES[match[2]]


@click.command()
@click.option("--recompile", is_flag=True, help="compile again and compare, byte by byte")
@click.option("--repair", is_flag=True, help="set bad kernels of the user's cache aside, remake")
@json_option
def verify(recompile: bool, repair: bool, as_json: bool) -> None:
    """Check every kernel: owner, mode, size, checksum, architecture, key.

    Ends with status 1 if one is bad. --recompile passes over kernels of another compiler, or of
    other templates, and counts them.
    """
    cache = own_cache(to_write=repair)
    work = [
        (where, store, key)
        for where, store in named_stores(cache)
        if is_trusted(store)
        for key in list(store.keys())
    ]
    bad: list[dict[str, Any]] = []
    counts = {"checked": 0, "recompiled": 0, "not_comparable": 0}
    with progress("checking", len(work)) as step:
        for where, store, key in work:
            counts["checked"] += 1
            looked, metadata = _look(store, key)
            reason = looked.reason if isinstance(looked, Bad) else None
            if isinstance(looked, Entry) and looked.metadata.key_again() != key:
                reason = "its key is not that of what it says it is"
            if reason is None and recompile and isinstance(looked, Entry):
                compared = _compile_again(looked)
                counts["not_comparable" if compared is None else "recompiled"] += 1
                if compared is False:
                    reason = "compiling it again gives other bytes"
            step("")
            if reason is not None:
                repaired = repair and store is cache and _repair(cache, key, looked, metadata)
                bad.append({"key": key, "where": where, "reason": reason, "repaired": repaired})
    lines = [
        f"bad {one['key'][:16]} ({one['where']}): {one['reason']}"
        + (", made again" if one["repaired"] else "")
        for one in bad
    ]
    compared_text = (
        f", {counts['recompiled']} compiled again, {counts['not_comparable']} of other compilers "
        "or templates"
        if recompile
        else ""
    )
    lines.append(f"{counts['checked']} checked, {len(bad)} bad{compared_text}")
    emit({**counts, "bad": bad}, as_json, "\n".join(lines))
    sys.exit(1 if any(not one["repaired"] for one in bad) else 0)


def _look(store: Store, key: str) -> tuple[Entry | Bad | None, Metadata | None]:
    """Check an entry against what its own metadata says it is for."""
    try:
        metadata = from_json(read(store.paths(key)[1], MAX_JSON_BYTES, store.owners).data)
    except OSError:
        metadata = None
    looked = store.look(key, "" if metadata is None else metadata.arch)
    return looked, metadata


def _compile_again(entry: Entry) -> bool | None:
    """Whether the cubin comes out the same; None if that cannot be asked here."""
    metadata = entry.metadata
    try:
        spec = spec_from_dict(metadata.spec)
        compiler = compilers.chosen()
        source = sources.closure(spec.family)
        if (
            str(compiler) != metadata.toolchain
            or source.digest != metadata.source_digest
            or build.key_of(spec) != metadata.key
        ):
            return None
        return nvrtc.compile_spec(spec, source, compiler).cubin == entry.cubin
    except (ValueError, CompileError):
        return None


def _repair(
    cache: DiskCache, key: str, looked: Entry | Bad | None, metadata: Metadata | None
) -> bool:
    """Set a bad entry aside, and compile it anew if it says what it is."""
    cache.set_aside(looked if isinstance(looked, Bad) else Bad(key, "", (None, None)))
    if metadata is None:
        return False
    try:
        build.rebuild(spec_from_dict(metadata.spec))
    except (ValueError, JitAttnError):
        return False
    return True


@click.command()
@click.option("--older-than", type=_Duration(), help="not used for so long: 30d, 12h …")
@click.option("--max-bytes", type=_Size(), help="least recently used first, until so much is left")
@click.option("--other-toolchains", is_flag=True, help="made by other compilers than the installed")
@click.option("--stale", is_flag=True, help="made from other templates than the installed")
@yes_option
@json_option
def prune(
    older_than: float | None,
    max_bytes: int | None,
    other_toolchains: bool,
    stale: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete kernels of your cache that are no longer needed, and what dead writers left.

    With no option: only what dead writers left, and entries that were set aside.
    """
    cache = own_cache(to_write=not dry_run)
    usage = cache.usage()
    doomed: set[str] = set()
    if older_than is not None:
        doomed |= {key for key in usage if _unused_seconds(cache, key) > older_than}
    if other_toolchains:
        installed = {str(toolchain) for toolchain in compilers.installed().values()}
        doomed |= {entry.key for entry in cache.entries() if entry.toolchain not in installed}
    if stale:
        doomed |= {entry.key for entry in cache.entries() if not _is_current(entry)}
    if max_bytes is not None:
        left = sum(size for key, size in usage.items() if key not in doomed)
        for key, size in usage.items():  # least recently used first
            if left <= max_bytes:
                break
            if key not in doomed:
                doomed.add(key)
                left -= size
    freed = sum(usage.get(key, 0) for key in doomed)
    swept = 0
    if not dry_run:
        if doomed:
            confirm(f"Delete {len(doomed)} kernels, {freed} bytes, from {cache.root}?", yes)
            cache.clear(doomed)
        swept = cache.sweep(keep_bad=0)
    result = {"kernels": sorted(doomed), "bytes": freed, "swept": swept, "dry_run": dry_run}
    verb = "would go" if dry_run else "deleted"
    emit(result, as_json, f"{len(doomed)} kernels, {freed} bytes {verb}; {swept} leftovers swept")


def _unused_seconds(cache: DiskCache, key: str) -> float:
    try:
        return time.time() - os.lstat(cache.paths(key)[1]).st_mtime
    except OSError:
        return 0.0


def _is_current(metadata: Metadata) -> bool:
    """Whether the installed version would look for this kernel, whatever the compiler."""
    try:
        spec = spec_from_dict(metadata.spec)
    except ValueError:
        return False
    header = sha256(render(spec).encode())
    return (
        sources.digest(spec.family) == metadata.source_digest and header == metadata.header_digest
    )


@click.command()
@click.option("--arch", type=Archs(), help="only these")
@click.option("--imported", "with_imported", is_flag=True, help="imported archives as well")
@yes_option
@json_option
def clear(
    arch: list[str] | None, with_imported: bool, yes: bool, dry_run: bool, as_json: bool
) -> None:
    """Delete every kernel of your cache. Read-only directories are never touched."""
    cache = own_cache(to_write=not dry_run)
    keys = None
    if arch is not None:
        keys = {entry.key for entry in cache.entries() if entry.arch in arch}
    present = cache.keys() if keys is None else sorted(keys)
    archives = [store.root for store in imported(cache)]
    if dry_run:
        deleted, removed = len(present), len(archives) if with_imported else 0
    else:
        what = f"{len(present)} kernels" + (
            f" and {len(archives)} imported archives" if with_imported else ""
        )
        confirm(f"Delete {what} in {cache.root}?", yes)
        deleted, removed = cache.clear(keys), 0
        for root in archives if with_imported else ():
            shutil.rmtree(root, ignore_errors=True)
            removed += not root.exists()
    kept = len(archives) - removed
    lines = [f"{deleted} {'would be ' if dry_run else ''}deleted"]
    if removed or with_imported:
        lines.append(f"{removed} imported archives {'would be ' if dry_run else ''}deleted")
    elif kept:
        lines.append(f"{kept} imported archives kept; --imported deletes them")
    result = {
        "deleted": deleted,
        "imported_deleted": removed,
        "imported_kept": kept,
        "dry_run": dry_run,
    }
    if dry_run and not as_json:
        lines += [
            f"  {entry.key[:16]} {describe(entry.spec)}"
            for entry in cache.entries()
            if entry.key in set(present)
        ]
    click.echo(json.dumps(result) if as_json else "\n".join(lines))

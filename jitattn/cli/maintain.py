"""Commands that delete kernels: prune, clear."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

import click

from jitattn.cache import leftovers
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Metadata, sha256
from jitattn.cli.common import (
    Archs,
    confirm,
    emit,
    fail,
    json_option,
    warn,
    yes_option,
)
from jitattn.cli.entries import trusted_cache
from jitattn.cli.words import counted, describe
from jitattn.cli.words import size as size_text
from jitattn.jit import compilers, sources
from jitattn.jit.codegen import render
from jitattn.spec.kernel_spec import spec_from_dict

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZES = {"": 0, "K": 10, "M": 20, "G": 30}


class _Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:  # noqa: ANN401 - click's
        match = re.fullmatch(r"([0-9]{1,9})([smhdw])", str(value))
        if match is None:
            self.fail(f"{value!r}: it must be a number and a unit, as in 30d (s, m, h, d, w)")
        return int(match[1]) * _UNITS[match[2]]


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:  # noqa: ANN401 - click's
        match = re.fullmatch(r"([0-9]{1,15})([KMG]?)", str(value).upper())
        if match is None:
            self.fail(f"{value!r}: it must be a number of bytes, as in 100000 or 100M")
        return int(match[1]) << _SIZES[match[2]]


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
    """Delete kernels of your cache that the options name, and leftovers.

    Leftovers are what no process can use: drafts and cubins of writers that died, unfinished
    imports, and damaged entries that were set aside. Without options, only they go.
    """
    cache = trusted_cache(to_write=not dry_run)
    trouble: list[OSError] = []
    usage = cache.usage(trouble)
    doomed: set[str] = set()
    if older_than is not None:
        doomed |= {key for key in usage if _unused_seconds(cache, key) > older_than}
    if other_toolchains:
        installed = {str(toolchain) for toolchain in compilers.installed().values()}
        if not installed:
            fail("--other-toolchains: no NVRTC is installed, so nothing here could be made again")
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
    seen: list[OSError] = []
    swept = cache.sweep(0, seen, is_dry=True)
    left_behind: set[str] = set()
    if not dry_run and (doomed or swept):
        size = sum(usage.get(key, 0) for key in doomed)
        confirm(f"Delete {_words(len(doomed), size, swept)} from {cache.root}?", yes)
        left_behind = doomed - cache.delete(doomed)
        swept = cache.sweep(0, trouble)
    else:
        trouble += seen
    doomed -= left_behind
    freed = sum(usage.get(key, 0) for key in doomed)
    result = {"kernels": sorted(doomed), "bytes": freed, "swept": swept, "dry_run": dry_run}
    verb = "would be deleted" if dry_run else "deleted"
    emit(result, as_json, f"{_words(len(doomed), freed, swept)} {verb}")
    sys.exit(_report(cache, left_behind, trouble))


def _words(kernels: int, num_bytes: int, leftovers_found: int) -> str:
    """Describe what is deleted: 2 kernels (80.0 KiB) and 1 leftover."""
    return (
        f"{counted(kernels, 'kernel')} ({size_text(num_bytes)}) and "
        f"{counted(leftovers_found, 'leftover')}"
    )


def _report(cache: DiskCache, left_behind: set[str], trouble: list[OSError]) -> int:
    """Report errors of deletion and return the exit status."""
    if left_behind:
        warn(f"{counted(len(left_behind), 'kernel')} in {cache.root} could not be deleted")
    for error in trouble:
        warn(f"{cache.root}: not everything could be deleted: {error}")
    return 1 if left_behind or trouble else 0


def _unused_seconds(cache: DiskCache, key: str) -> float:
    try:
        return time.time() - os.lstat(cache.paths(key)[1]).st_mtime
    except OSError:
        return 0.0


def _is_current(metadata: Metadata) -> bool:
    """Return whether the installed version would look up this kernel, with any compiler."""
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
    if arch is not None and with_imported:
        fail("--imported deletes whole archives, whatever is in them: leave --arch out", 2)
    cache = trusted_cache(to_write=not dry_run)
    trouble: list[OSError] = []
    doomed = set(cache.usage(trouble))
    if arch is not None:
        doomed = {entry.key for entry in cache.entries() if entry.arch in arch}
    archives = leftovers.imports(cache, trouble)
    left_behind: set[str] = set()
    deleted, removed = len(doomed), len(archives) if with_imported else 0
    if not dry_run:
        what = counted(len(doomed), "kernel") + (
            f" and {counted(len(archives), 'imported archive')}" if with_imported else ""
        )
        confirm(f"Delete {what} in {cache.root}?", yes)
        left_behind = doomed - cache.delete(doomed)
        deleted = len(doomed - left_behind)
        removed = leftovers.delete_imports(cache, trouble) if with_imported else 0
        cache.sweep(trouble=trouble)
    kept = len(archives) - removed
    verb = "would be deleted" if dry_run else "deleted"
    lines = [f"{counted(deleted, 'kernel')} {verb}"]
    if removed or with_imported:
        lines.append(f"{counted(removed, 'imported archive')} {verb}")
    elif kept:
        them = "it" if kept == 1 else "them"
        lines.append(f"{counted(kept, 'imported archive')} kept; --imported deletes {them}")
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
            if entry.key in doomed
        ]
    emit(result, as_json, "\n".join(lines))
    sys.exit(_report(cache, left_behind, trouble))

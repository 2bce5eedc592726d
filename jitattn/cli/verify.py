"""Command `jitattn-cache verify`: check every kernel against its metadata."""

from __future__ import annotations

import sys
from typing import Any

import click

from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry, Metadata
from jitattn.cache.store import Bad
from jitattn.cli.common import emit, json_option, own_cache
from jitattn.cli.entries import (
    check,
    distrust,
    is_trusted,
    metadata_of,
    named_stores,
)
from jitattn.cli.progress import progress
from jitattn.cli.words import counted, describe
from jitattn.errors import JitAttnError
from jitattn.jit import build, compilers, nvrtc, sources
from jitattn.spec.kernel_spec import spec_from_dict
from jitattn.spec.text import one_line


@click.command()
@click.option("--recompile", is_flag=True, help="compile again and compare, byte by byte")
@click.option("--repair", is_flag=True, help="set bad kernels of the user's cache aside, remake")
@json_option
def verify(recompile: bool, repair: bool, as_json: bool) -> None:
    """Check every kernel: owner, mode, size, checksum, architecture, key.

    Ends with status 1 if one is bad, or if a directory is not used because others may write to it.
    --recompile passes over kernels of another compiler, or of other templates, and counts them.
    Cubins without metadata are listed, but are not bad: nothing uses them, and prune deletes them.
    """
    cache = own_cache(to_write=repair)
    stores = named_stores(cache)
    unused = {str(store.root): reason for _, store in stores if (reason := distrust(store))}
    work = [
        (where, store, key)
        for where, store in stores
        if is_trusted(store)
        for key in store.keys()  # noqa: SIM118 - a store is no mapping
    ]
    orphans = [
        (where, one.key) for where, store in stores if is_trusted(store) for one in store.orphans()
    ]
    bad: list[dict[str, Any]] = []
    counts = {"checked": 0, "recompiled": 0, "not_comparable": 0}
    with progress("checking", len(work)) as step:
        for where, store, key in work:
            metadata = metadata_of(store, key)
            looked = check(store, key)
            if looked is None:  # deleted meanwhile
                step("")
                continue
            counts["checked"] += 1
            if recompile and isinstance(looked, Entry):
                compared = _compile_again(looked)
                counts["not_comparable" if compared is None else "recompiled"] += 1
                if compared is False:
                    reason = "compiling it again gives other bytes"
                    looked = Bad(key, reason, (None, None))
            if isinstance(looked, Entry):
                words = describe(looked.metadata.spec)
                step(f"good {words}" if recompile else "", words)
                continue
            step(f"bad {key[:16]}: {one_line(looked.reason)}")
            repaired = repair and store is cache and _repair(cache, looked, metadata)
            bad.append({"key": key, "where": where, "reason": looked.reason, "repaired": repaired})
    lines = [
        one_line(f"bad {one['key'][:16]} ({one['where']}): {one['reason']}")
        + (", made again" if one["repaired"] else "")
        for one in bad
    ]
    lines += [one_line(f"not used: {root}: {reason}") for root, reason in unused.items()]
    compared_text = (
        f", {counts['recompiled']} compiled again, {counts['not_comparable']} of other compilers "
        "or templates"
        if recompile
        else ""
    )
    lines += [
        f"orphan {key[:16]} ({one_line(where)}): a cubin without metadata, which nothing uses"
        for where, key in orphans
    ]
    lines.append(
        f"{counted(counts['checked'], 'kernel')} checked, {len(bad)} bad{compared_text}"
        + (f", {counted(len(orphans), 'orphaned cubin')}" if orphans else "")
    )
    found = {"bad": bad, "orphans": [key for _, key in orphans], "not_used": unused}
    emit({**counts, **found}, as_json, "\n".join(lines))
    sys.exit(1 if unused or any(not one["repaired"] for one in bad) else 0)


def _compile_again(entry: Entry) -> bool | None:
    """Return whether compiling again gives the same cubin; None if that is impossible here."""
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
    except (ValueError, JitAttnError):  # JitAttnError: an unknown architecture, for example
        return None


def _repair(cache: DiskCache, bad: Bad, metadata: Metadata | None) -> bool:
    """Set a bad entry aside, and compile it again if its metadata is readable."""
    cache.set_aside(bad)
    if metadata is None:
        return False
    try:
        built = build.rebuild(spec_from_dict(metadata.spec))
    except (ValueError, JitAttnError):
        return False
    # The cache may be unwritable, with the bad files still in place.
    return isinstance(check(cache, built.key), Entry) and not isinstance(check(cache, bad.key), Bad)

"""Commands that carry kernels to another machine: export, import."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from jitattn.cache.archive import Imported, export, import_archive
from jitattn.cache.entry import KEY, Entry
from jitattn.cache.output import STREAM
from jitattn.cli.common import (
    Archs,
    Words,
    command_line,
    emit,
    fail,
    json_option,
    own_cache,
    warn,
)
from jitattn.cli.entries import (
    all_entries,
    check,
)
from jitattn.cli.words import counted, size
from jitattn.plan import choices


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--arch", type=Archs(), help="only these")
@click.option("--preset", type=Words(), help="only the kernels of model families, or all")
@click.option("--spec", "spec_file", type=click.Path(path_type=Path), help="only those of a file")
@click.option("-y", "--yes", is_flag=True, help="overwrite a file that is there")
@json_option
def export_archive(
    file: Path,
    arch: list[str] | None,
    preset: list[str] | None,
    spec_file: Path | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Write kernels to one archive FILE; the same kernels give the same bytes.

    FILE - is standard output; the summary then goes to stderr. Only kernels in the cache or in a
    read-only directory are exported; prebuild compiles missing ones.

    The archive is not compressed: compressors give other bytes from version to version, and a
    reader of stored members knows every size before it allocates. Kernels pack to a third and
    less, so compress the whole: jitattn-cache export - | xz > kernels.zip.xz, and on the other
    machine xz -dc kernels.zip.xz | jitattn-cache import -
    """
    cache = own_cache()
    chosen = all_entries(cache)
    if arch is not None:
        chosen = [found for found in chosen if found.metadata.arch in arch]
    with command_line():
        asked = [("preset", choice) for choice in choices.preset(preset or ())]
    asked += choices.read_entries(spec_file) if spec_file else []
    missing = 0
    if preset or spec_file:
        archs = arch or sorted({found.metadata.arch for found in chosen})
        made, errors = choices.expand(asked, archs) if archs else ([], [])
        for error in errors:
            raise error
        specs = {_frozen(spec.to_dict()) for spec in made}
        chosen = [found for found in chosen if _frozen(found.metadata.spec) in specs]
        missing = len(specs - {_frozen(found.metadata.spec) for found in chosen})
    good: dict[str, Entry] = {}
    bad: set[str] = set()
    for found in chosen:
        key = found.metadata.key
        if key in good:
            continue
        looked = check(found.store, key)
        if isinstance(looked, Entry):
            good[key] = looked
        elif looked is not None:
            bad.add(key)
            warn(f"the kernel {key[:16]} in {found.store.root} is left out: {looked.reason}")
    if not good:
        fail("there is no such kernel to export; jitattn-cache prebuild makes kernels")
    if missing:
        warn(
            f"of the kernels asked for, {missing} {'is' if missing == 1 else 'are'} not there; "
            "jitattn-cache prebuild makes them"
        )
    done = export(file, good.values(), overwrite=yes)
    emit(
        {
            "kernels": done.count,
            "bytes": done.bytes,
            "sha256": done.sha256,
            "left_out": len(bad),
            "missing": missing,
        },
        as_json,
        f"{counted(done.count, 'kernel')}, {size(done.bytes)}, sha256 {done.sha256}",
        to_stderr=file == STREAM,
    )
    sys.exit(1 if bad else 0)


def _frozen(spec: dict[str, str | int]) -> frozenset[tuple[str, str | int]]:
    return frozenset(spec.items())


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--sha256", help="what the checksum of FILE has to be")
@json_option
def import_archive_command(file: Path, sha256: str | None, as_json: bool) -> None:
    """Check an archive FILE and add its kernels to the cache; FILE - is standard input.

    They are used with any compiler that is installed here. Archives are not signed: import only
    what you would run. A damaged or no longer trusted import is replaced.
    """
    if sha256 is not None and not KEY.fullmatch(sha256.lower()):
        fail(f"--sha256 {sha256}: it must be 64 hexadecimal digits", 2)
    done = import_archive(file, own_cache(to_write=True), sha256=sha256)
    emit(
        {
            "kernels": done.count,
            "sha256": done.sha256,
            "directory": str(done.folder),
            "was_there": done.was_there,
            "was_repaired": done.was_repaired,
        },
        as_json,
        f"{counted(done.count, 'kernel')} {_how(done)}, sha256 {done.sha256}",
    )


def _how(done: Imported) -> str:
    if done.was_there:
        return f"{'was' if done.count == 1 else 'were'} there already"
    return "imported again, as not all was in order" if done.was_repaired else "imported"

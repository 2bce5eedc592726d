"""Read-only commands: list, show, extract, path, stats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

from jitattn.cache import leftovers, settings
from jitattn.cache.entry import Entry, sha256
from jitattn.cache.output import STREAM
from jitattn.cache.output import write as write_file
from jitattn.cli import streams
from jitattn.cli.common import (
    Archs,
    Words,
    emit,
    fail,
    json_option,
    own_cache,
    warn,
)
from jitattn.cli.entries import (
    Found,
    all_entries,
    check,
    find_by_key,
    is_trusted,
    named_stores,
)
from jitattn.cli.tables import print_rows
from jitattn.cli.words import counted, dims, dtypes, features, size, tile
from jitattn.jit import sources
from jitattn.jit.codegen import render
from jitattn.plan import choice_fields, choices
from jitattn.spec.kernel_spec import families, spec_from_dict
from jitattn.spec.text import one_line

#: Columns of `list`. Some stand for several fields, so that they fit beside one another.
_COLUMNS = (
    "key", "where", "family", "arch", "dtype", "dim", "mask", "tile", "others", "size", "registers",
    "spill_bytes", "smem_bytes", "compile_ms", "toolchain",
)  # fmt: skip
#: Columns that a narrow terminal omits, in this order.
_DROPPABLE = (
    "smem_bytes", "compile_ms", "toolchain", "registers", "spill_bytes", "where", "size", "others",
    "family",
)  # fmt: skip
#: Columns that it shortens before that.
_ELASTIC = ("others", "where")
_NUMBERS = ("size", "registers", "spill_bytes", "smem_bytes", "compile_ms")


def _row(found: Found) -> dict[str, Any]:
    metadata = found.metadata
    return {
        **metadata.spec,  # first, so that nothing in it passes for a later line
        "key": metadata.key,
        "where": found.where,
        "toolchain": metadata.toolchain,
        "registers": metadata.registers,
        "stack_bytes": metadata.stack_bytes,
        "spill_bytes": metadata.spill_bytes,
        "smem_bytes": metadata.smem_bytes,
        "compile_ms": metadata.compile_ms,
        "bytes": metadata.bytes,
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a row of the table."""
    spec = {name: value for name, value in row.items() if name not in _NOT_OF_SPEC}
    return {
        **row,
        "key": row["key"][:16],
        "dtype": dtypes(spec),
        "dim": dims(spec),
        "tile": tile(spec),
        "others": features(spec),
        "size": size(row["bytes"]),
    }


#: Fields of a row that are not of the spec.
_NOT_OF_SPEC = {
    "key", "where", "toolchain", "registers", "stack_bytes", "spill_bytes", "smem_bytes",
    "compile_ms", "bytes",
}  # fmt: skip


@click.command("list")
@click.option("--arch", type=Archs(), help="only these: 80,90; native: of this machine's GPUs")
@click.option("--family", type=Words(), help="only these: fwd, combine, append …")
@click.option("--dtype", type=Words(), help="only these: fp16, bf16, fp32")
@click.option("--head-dim", type=Words(), help="only these")
@click.option("--mask", type=Words(), help="only these: full, causal …")
@click.option("--where", type=Words(), help="only these: user, imported, or a directory")
@click.option("--sort", default="key", help="a column, as in bytes or compile_ms")
@click.option("--reverse", is_flag=True, help="largest first")
@json_option
def list_entries(sort: str, reverse: bool, as_json: bool, **filters: list[str] | None) -> None:
    """List the kernels in the cache and in the read-only directories.

    A tile is query rows x keys x stages. A narrow terminal shows fewer columns; --json has all
    fields.
    """
    cache = own_cache()
    rows = [_row(found) for found in all_entries(cache)]
    _check_filters(filters, rows, {"user", "imported", *(name for name, _ in named_stores(cache))})
    for name, allowed in filters.items():
        if allowed is not None:
            rows = [row for row in rows if str(row.get(name, "")) in allowed]
    known = {name for row in rows for name in row}
    if rows and sort not in known:
        fail(f"--sort {sort}: it must be one of {', '.join(sorted(known))}", 2)
    rows.sort(key=lambda row: _order(row.get(sort)), reverse=reverse)
    if as_json:
        streams.write(f"{json.dumps(rows)}\n")
    elif not rows:
        streams.write_message("no kernels\n")
    else:
        print_rows(_COLUMNS, list(map(_shown, rows)), _DROPPABLE, _ELASTIC, _NUMBERS)


def _check_filters(
    filters: dict[str, list[str] | None], rows: list[dict[str, Any]], places: set[str]
) -> None:
    """Refuse values that no kernel of this version can have, nor one of those that are there."""
    fields = choices.problem_fields()
    known = {
        "family": {*families()},
        "dtype": {*(fields["dtype"] or ())},
        "mask": {*(fields["mask"] or ())},
        "where": places,
        "head_dim": {str(number) for number in range(1, choice_fields.MAX_HEAD_DIM + 1)},
    }
    for name, words in filters.items():
        allowed = known.get(name)
        there = {str(row[name]) for row in rows if name in row}
        for word in words or ():
            if allowed is not None and word not in allowed | there:
                option = f"--{name.replace('_', '-')}"
                rule = f"one of {', '.join(sorted(allowed))}"
                if name == "head_dim":
                    rule = f"a number from 1 to {choice_fields.MAX_HEAD_DIM}"
                fail(f"{option} {word}: it must be {rule}", 2)


def _order(value: object) -> tuple[int, object]:
    """Return a sort key: missing fields first, then numbers by value, then words."""
    return (0, 0) if value is None else (2 if isinstance(value, str) else 1, value)


@click.command()
@click.argument("key")
@click.option("--source", is_flag=True, help="the templates as well, if they are still the same")
@json_option
def show(key: str, source: bool, as_json: bool) -> None:
    """Show everything about the kernel whose key begins with KEY."""
    found = find_by_key(own_cache(), key)
    metadata = found.metadata
    cubin_path, json_path = found.store.paths(metadata.key)
    header = command = None
    templates: dict[str, str] | None = None
    try:
        spec = spec_from_dict(metadata.spec)
    except ValueError:
        pass  # made by a version with other specs
    else:
        command = spec.command()
        text = render(spec)
        if sha256(text.encode()) == metadata.header_digest:
            header = text
        closure = sources.closure(spec.family)
        if closure.digest == metadata.source_digest:
            templates = {f"entry/{spec.family}.cu": closure.entry, **closure.headers}
    record: dict[str, Any] = {
        **_row(found),
        "spec": metadata.spec,
        "options": list(metadata.options),
        "sha256": metadata.sha256,
        "source_digest": metadata.source_digest,
        "cubin": str(cubin_path),
        "metadata": str(json_path),
        "command": command,
        "log": metadata.log,
        "header": header,
        "templates_are_current": templates is not None,
    }
    if source:
        record["templates"] = templates
    texts = ("log", "header", "templates", "spec", "options")
    lines = [f"{name:22s} {one_line(value)}" for name, value in record.items() if name not in texts]
    lines += ["", "options", f"  {' '.join(metadata.options)}"]
    lines += ["", "compiler log", *(f"  {line}" for line in metadata.log.splitlines())]
    missing = "  (made by another version of the templates)"
    lines += ["", "generated header", *(_indented(header) if header else [missing])]
    if source:
        for name, text in (templates or {"templates": missing}).items():
            lines += ["", name, *_indented(text)]
    emit(record, as_json, "\n".join(lines))


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


@click.command()
@click.argument("key")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="default: KEY.cubin")
@click.option("-y", "--yes", is_flag=True, help="overwrite a file that is there")
@json_option
def extract(key: str, output: Path | None, yes: bool, as_json: bool) -> None:
    """Write the cubin of a kernel to a file, for cuobjdump or nvdisasm.

    With -o - the bytes go to standard output, and their number to stderr.
    """
    found = find_by_key(own_cache(), key)
    metadata = found.metadata
    looked = check(found.store, metadata.key)
    if not isinstance(looked, Entry):
        reason = "it is gone" if looked is None else looked.reason
        fail(f"the kernel {metadata.key[:16]} failed its checks: {reason}")
    path = Path(f"{metadata.key[:16]}.cubin") if output is None else output
    write_file(path, [looked.cubin], overwrite=yes)
    emit(
        {"path": str(path), "bytes": metadata.bytes},
        as_json,
        f"{size(metadata.bytes)} to standard output" if path == STREAM else one_line(path),
        to_stderr=path == STREAM,
    )


@click.command()
@json_option
def path(as_json: bool) -> None:
    """Print the cache directory, which need not exist yet; nothing is made."""
    root = own_cache().root
    emit(str(root), as_json, one_line(root))


@click.command()
@json_option
def stats(as_json: bool) -> None:
    """Count kernels and bytes, directory by directory."""
    cache = own_cache()
    trouble: list[OSError] = []
    usage = cache.usage(trouble)
    left = Counter(one.kind for one in leftovers.find(cache, trouble))
    rows: list[dict[str, Any]] = []
    for where, store in named_stores(cache):
        entries = list(store.entries()) if is_trusted(store) else []
        by_arch = Counter(entry.arch for entry in entries)
        rows.append(
            {
                "where": where,
                "directory": str(store.root),
                "kernels": len(entries),
                "bytes": sum(entry.bytes for entry in entries),
                **dict(sorted(by_arch.items())),
            }
        )
    summary = {
        "directories": rows,
        "disk_bytes": sum(usage.values()),
        "limit_bytes": settings.cache_max_bytes(),
        "set_aside": left["aside"],
        "drafts": left["draft"],
        "unfinished_imports": left["import"],
        "orphans": left["orphan"],
    }
    for error in trouble:
        warn(f"{cache.root}: not everything could be counted: {error}")
    archs = sorted({name for row in rows for name in row if name.startswith("sm_")})
    if not as_json:
        columns = ("kernels", "size", *archs, "where", "directory")
        # Of a read-only directory the name is the path.
        shown = [
            {
                **row,
                "size": size(row["bytes"]),
                "where": "read-only" if row["where"] == row["directory"] else row["where"],
            }
            for row in rows
        ]
        print_rows(columns, shown, archs, ("directory",), ("kernels", "size", *archs))
    emit(
        summary,
        as_json,
        f"on disk {size(sum(usage.values()))} of {size(settings.cache_max_bytes())}, "
        f"{counted(left['aside'], 'file')} set aside, {counted(left['draft'], 'draft')}, "
        f"{counted(left['import'], 'unfinished import')}, "
        f"{counted(left['orphan'], 'orphaned cubin')}",
    )

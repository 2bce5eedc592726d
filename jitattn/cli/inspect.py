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
    print_rows,
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
from jitattn.jit import sources
from jitattn.jit.codegen import render
from jitattn.spec.kernel_spec import spec_from_dict
from jitattn.spec.text import one_line

_COLUMNS = (
    "key", "where", "family", "arch", "dtype", "head_dim", "head_dim_v", "mask", "block_q",
    "block_kv", "registers", "spill_bytes", "smem_bytes", "compile_ms", "bytes", "toolchain",
)  # fmt: skip
#: Columns that a narrow terminal omits, in this order.
_DROPPABLE = (
    "smem_bytes", "compile_ms", "block_kv", "block_q", "toolchain", "spill_bytes", "registers",
    "head_dim_v", "family", "bytes",
)  # fmt: skip


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


@click.command("list")
@click.option("--arch", type=Archs(), help="only these")
@click.option("--family", type=Words(), help="only these: fwd, combine, append")
@click.option("--dtype", type=Words(), help="only these")
@click.option("--head-dim", type=Words(), help="only these")
@click.option("--mask", type=Words(), help="only these")
@click.option("--where", type=Words(), help="only these: user, imported, or a directory")
@click.option("--sort", default="key", help="a column, as in bytes or compile_ms")
@click.option("--reverse", is_flag=True, help="largest first")
@json_option
def list_entries(sort: str, reverse: bool, as_json: bool, **filters: list[str] | None) -> None:
    """List the kernels in the cache and in the read-only directories."""
    rows = [_row(found) for found in all_entries(own_cache())]
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
        print_rows(_COLUMNS, [{**row, "key": row["key"][:16]} for row in rows], _DROPPABLE)


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
    """Write the cubin of a kernel to a file, for cuobjdump or nvdisasm; - is standard output."""
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
        one_line(path),
        to_stderr=path == STREAM,
    )


@click.command()
@json_option
def path(as_json: bool) -> None:
    """Print the cache directory."""
    root = own_cache().root
    emit(str(root), as_json, one_line(root))


@click.command()
@json_option
def stats(as_json: bool) -> None:
    """Count kernels and bytes, directory by directory."""
    cache = own_cache()
    trouble: list[OSError] = []
    left = Counter(one.kind for one in leftovers.find(cache, trouble))
    rows = []
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
        "disk_bytes": sum(cache.usage().values()),
        "limit_bytes": settings.cache_max_bytes(),
        "set_aside": left["aside"],
        "drafts": left["draft"],
        "unfinished_imports": left["import"],
    }
    for error in trouble:
        warn(f"{cache.root}: not everything could be counted: {error}")
    archs = sorted({name for row in rows for name in row if name.startswith("sm_")})
    if not as_json:
        print_rows(("where", "directory", "kernels", "bytes", *archs), rows)
    emit(
        summary,
        as_json,
        f"on disk {summary['disk_bytes']} of {summary['limit_bytes']} bytes, "
        f"{summary['set_aside']} files set aside, {summary['drafts']} drafts, "
        f"{summary['unfinished_imports']} unfinished imports",
    )

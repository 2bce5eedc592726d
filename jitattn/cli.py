"""`jitattn-cache`: prebuild, list and clear kernels. Needs no GPU.

Results go to stdout and nothing else does; progress and messages go to stderr. Exit status: 0 done,
1 something failed, 2 the command line is wrong.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any, NoReturn

from jitattn.errors import JitAttnError
from jitattn.jit import build, settings
from jitattn.jit.cache import DiskCache, user_cache
from jitattn.jit.prebuild import Outcome, build_all, forward_specs
from jitattn.jit.spec import Dtype, MaskKind

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as _error:
    sys.stderr.write(f"jitattn-cache needs the extra cli ({_error}): pip install 'jitattn[cli]'\n")
    sys.exit(2)


class _Choices(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A comma-separated list of words from a set."""

    name = "list"

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = allowed

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:  # noqa: ANN401 - click's
        words = value if isinstance(value, list) else [word.strip() for word in value.split(",")]
        for word in words:
            if word not in self.allowed:
                self.fail(f"{word!r} is none of {', '.join(self.allowed)}", param, ctx)
        return words


class _Archs(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A comma-separated list of architectures: 80,86 or sm_80,sm_86."""

    name = "archs"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:  # noqa: ANN401 - click's
        numbers = [word.strip().removeprefix("sm_") for word in value.split(",")]
        for number in numbers:
            if not number.isdecimal() or not 80 <= int(number) <= 999:
                self.fail(
                    f"{number!r} is no architecture from 80 on, as in 80,86,89,90", param, ctx
                )
        return [f"sm_{number}" for number in numbers]


class _HeadDims(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A comma-separated list of head dims: 64,128, or 192:128 where v's differs."""

    name = "dims"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[tuple[int, int]]:  # noqa: ANN401
        dims = []
        for word in value.split(","):
            qk, _, v = word.strip().partition(":")
            pair = (qk, v or qk)
            if not all(part.isdecimal() and 1 <= int(part) <= 256 for part in pair):
                self.fail(
                    f"{word!r} is no head dim from 1 to 256, as in 64,128,192:128", param, ctx
                )
            dims.append((int(pair[0]), int(pair[1])))
        return dims


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look after jitattn's kernel cache."""


@main.command()
@click.option("--arch", type=_Archs(), required=True, help="80,86,89,90 …")
@click.option("--dtype", type=_Choices([d.value for d in Dtype]), default="fp16,bf16")
@click.option("--head-dim", type=_HeadDims(), default="64,128", help="64,128, or 192:128 for D:Dv")
@click.option("--mask", type=_Choices([m.value for m in MaskKind]), default="full,causal")
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="processes (default: all cores)")
@click.option("--json", "as_json", is_flag=True, help="one JSON object on stdout")
def prebuild(
    arch: list[str],
    dtype: list[str],
    head_dim: list[tuple[int, int]],
    mask: list[str],
    jobs: int | None,
    as_json: bool,
) -> None:
    """Compile kernels into the cache, for any architecture."""
    cache = _cache()
    start = time.perf_counter()
    try:
        if settings.cache_mode() != "rw":
            _fail(f"prebuild writes to the cache, but JITATTN_CACHE={settings.cache_mode()}", 2)
        specs = forward_specs(arch, map(Dtype, dtype), head_dim, map(MaskKind, mask))
    except JitAttnError as error:
        _fail(str(error))
    counts = {"compiled": 0, "cached": 0, "failed": 0}
    total_bytes = 0
    console = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(specs))
        for done, built in enumerate(build_all(specs, jobs), 1):
            outcome = _checked(built, cache)
            name = {"disk": "cached"}.get(outcome.origin, outcome.origin)
            counts[name] += 1
            total_bytes += outcome.bytes
            progress.advance(task)
            if outcome.error or not console.is_terminal:
                line = _line(done, len(specs), name, outcome)
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    result = {**counts, "seconds": round(time.perf_counter() - start, 2), "bytes": total_bytes}
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(
            f"{counts['compiled']} compiled, {counts['cached']} cached, {counts['failed']} failed "
            f"in {result['seconds']} s, {total_bytes} bytes"
        )
    sys.exit(1 if counts["failed"] else 0)


@main.command("list")
@click.option("--json", "as_json", is_flag=True, help="a JSON array of flat objects on stdout")
def list_entries(as_json: bool) -> None:
    """List the kernels in the cache."""
    rows: list[dict[str, Any]] = [
        {
            "key": entry.key,
            **entry.spec,
            "arch": entry.arch,
            "registers": entry.registers,
            "spill_bytes": entry.spill_bytes,
            "smem_bytes": entry.smem_bytes,
            "compile_ms": entry.compile_ms,
            "bytes": entry.bytes,
        }
        for entry in _cache().entries()
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    if not rows:
        click.echo("the cache is empty", err=True)
        return
    columns = (
        "family",
        "arch",
        "dtype",
        "head_dim",
        "head_dim_v",
        "mask",
        "block_q",
        "block_kv",
        "registers",
        "spill_bytes",
        "smem_bytes",
        "compile_ms",
        "bytes",
    )
    table = Table("key", *columns, box=None)
    for row in rows:
        table.add_row(row["key"][:16], *(str(row.get(column, "")) for column in columns))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@main.command()
def path() -> None:
    """Print the cache directory."""
    click.echo(_cache().root)


@main.command()
@click.option("-y", "--yes", is_flag=True, help="do not ask")
def clear(yes: bool) -> None:
    """Delete every kernel in the cache."""
    cache = _cache()
    if not yes:
        if not sys.stdin.isatty():
            _fail("clear deletes kernels and cannot ask here: add --yes", 2)
        click.confirm(f"Delete every kernel in {cache.root}?", abort=True, err=True)
    click.echo(f"{cache.clear()} deleted")


def _cache() -> DiskCache:
    try:
        cache = user_cache()
    except JitAttnError as error:
        _fail(str(error), 2)
    if cache is None:
        _fail("no cache directory is to be had: set JITATTN_CACHE_DIR to one that you can write")
    return cache


def _checked(outcome: Outcome, cache: DiskCache) -> Outcome:
    """Turn a kernel that was compiled but is not on disk into a failure."""
    if outcome.origin != "compiled" or cache.read(build.key_of(outcome.spec), outcome.spec.arch):
        return outcome
    error = f"compiled, but {cache.root} does not keep it; see JITATTN_CACHE_DIR"
    return replace(outcome, origin="failed", bytes=0, error=error)


def _line(done: int, total: int, name: str, outcome: Outcome) -> str:
    spec = outcome.spec.to_dict()
    what = " ".join(
        str(spec[field])
        for field in ("family", "arch", "dtype", "out_dtype", "head_dim", "head_dim_v", "mask")
        if field in spec
    )
    detail = f": {outcome.error}" if outcome.error else f" in {outcome.seconds:.2f} s"
    return f"[{done}/{total}] {name} {what}{detail}"


def _fail(message: str, status: int = 1) -> NoReturn:
    click.echo(f"jitattn-cache: {message}", err=True)
    sys.exit(status)

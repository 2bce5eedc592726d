"""What the commands share: option types, output, and finding entries by an abbreviated key."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jitattn.errors import CacheError, JitAttnError
from jitattn.jit import files, settings
from jitattn.jit.cache import DiskCache, user_cache
from jitattn.jit.choices import arch_name
from jitattn.jit.entry import Metadata
from jitattn.jit.layers import imported, layers
from jitattn.jit.store import Store

_Function = TypeVar("_Function", bound=Callable[..., Any])
_SHORTEST_KEY = 4


class Commands(click.Group):
    """A group whose commands show jitattn's own errors as one line, not as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except JitAttnError as error:
            fail(str(error))


class Words(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A comma-separated list of words, from a set if there is one."""

    name = "list"

    def __init__(self, allowed: list[str] | None = None) -> None:
        self.allowed = allowed

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:  # noqa: ANN401 - click's
        """Split and check."""
        words = value if isinstance(value, list) else [word.strip() for word in value.split(",")]
        for word in words:
            if self.allowed is not None and word not in self.allowed:
                self.fail(f"{word!r} is none of {', '.join(self.allowed)}", param, ctx)
        return words


class Archs(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A comma-separated list of architectures: 80,86 or sm_80,sm_86."""

    name = "archs"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:  # noqa: ANN401 - click's
        """Split, check and name in full."""
        if isinstance(value, list):
            return value
        try:
            return [arch_name(word) for word in value.split(",")]
        except JitAttnError as error:
            self.fail(str(error), param, ctx)


def json_option(function: _Function) -> _Function:
    """Add --json, which every command has."""
    return click.option("--json", "as_json", is_flag=True, help="one JSON value on stdout")(
        function
    )


def yes_option(function: _Function) -> _Function:
    """Add -y and --dry-run, which every command has that deletes."""
    function = click.option("-y", "--yes", is_flag=True, help="do not ask")(function)
    return click.option("--dry-run", is_flag=True, help="say what would go, delete nothing")(
        function
    )


def fail(message: str, status: int = 1) -> NoReturn:
    """End with a message on stderr."""
    click.echo(f"jitattn-cache: {message}", err=True)
    sys.exit(status)


def emit(value: object, as_json: bool, text: str) -> None:
    """Print a result: as JSON, or as text for people."""
    click.echo(json.dumps(value) if as_json else text)


def confirm(question: str, yes: bool) -> None:
    """Ask before something is deleted; where nobody can be asked, -y is needed."""
    if yes:
        return
    if not sys.stdin.isatty():
        fail("this deletes kernels and cannot ask here: add --yes, or --dry-run to see", 2)
    click.confirm(question, abort=True, err=True)


def print_rows(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Print a table that fits the terminal; elsewhere, as wide as it is."""
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=None if sys.stdout.isatty() else 240).print(table)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Report progress on stderr: a bar on a terminal, plain lines elsewhere.

    Yields a function to call with a line for every step; an empty line is not printed.
    """
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, done = bar.add_task("", total=total), 0

        def step(line: str) -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            if line and not console.is_terminal:
                line = f"[{done}/{total}] {line}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)

        yield step


def warn(message: str) -> None:
    """Print a message on stderr."""
    click.echo(f"jitattn-cache: {message}", err=True)


def own_cache(*, to_write: bool = False) -> DiskCache:
    """Return the user's cache, or end the command if there is none."""
    cache = user_cache()
    if cache is None:
        fail("no cache directory is to be had: set JITATTN_CACHE_DIR to one that you can write")
    mode = settings.cache_mode()
    if to_write and mode != "rw":
        fail(f"this writes to the cache, but JITATTN_CACHE={mode}", 2)
    return cache


@dataclass(frozen=True, slots=True)
class Found:
    """An entry, by its metadata, and where it lies."""

    metadata: Metadata
    store: Store
    where: str  #: "user", "imported", or the directory


def named_stores(cache: DiskCache) -> list[tuple[str, Store]]:
    """Return the user's cache and the read-only directories, each with what to call it."""
    brought = {store.root for store in imported(cache)}
    others = [
        ("imported" if store.root in brought else str(store.root), store) for store in layers(cache)
    ]
    return [("user", cache), *others]


def all_entries(cache: DiskCache) -> list[Found]:
    """Return every entry whose metadata can be read, those of the user first."""
    return [
        Found(metadata, store, where)
        for where, store in named_stores(cache)
        if is_trusted(store)
        for metadata in store.entries()
    ]


def is_trusted(store: Store) -> bool:
    """Whether nobody else can write to a directory of kernels; says so if not."""
    try:
        for folder in (store.root, store.store):
            files.check_directory(folder, store.owners, may_be_link=folder == store.root)
    except files.UntrustedError as error:
        warn(f"{store.root} is not used: {error.filename}: {error.strerror}")
        return False
    except OSError:
        return False  # it is not there
    return True


def find_by_key(cache: DiskCache, key: str) -> Found:
    """Return the entry whose key begins so.

    Raises
    ------
    CacheError
        There is none, or there are several.
    """
    text = key.lower()
    if len(text) < _SHORTEST_KEY or not set(text) <= set("0123456789abcdef"):
        raise CacheError(f"key {key!r}: give at least {_SHORTEST_KEY} of its hexadecimal digits")
    found = [one for one in all_entries(cache) if one.metadata.key.startswith(text)]
    keys = sorted({one.metadata.key for one in found})
    if not keys:
        raise CacheError(f"no kernel's key begins with {key}; see jitattn-cache list")
    if len(keys) > 1:
        candidates = ", ".join(one[:16] for one in keys[:8])
        raise CacheError(f"{len(keys)} keys begin with {key}: {candidates}; give more digits")
    return found[0]


def describe(spec: dict[str, str | int]) -> str:
    """Say in a few words what a kernel is."""
    names = ("family", "arch", "dtype", "out_dtype", "head_dim", "head_dim_v", "mask")
    return " ".join(str(spec[name]) for name in names if name in spec)

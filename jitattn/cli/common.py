"""Option types, questions and output, shared by the commands."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from jitattn.cache import settings
from jitattn.cache.disk import DiskCache, user_cache
from jitattn.cli import streams
from jitattn.errors import CacheMissError, CompileError, InvalidInputError, JitAttnError
from jitattn.plan.choices import arch_name
from jitattn.spec.text import number_in, one_line, printable

_Function = TypeVar("_Function", bound=Callable[..., Any])
_WIDEST_CELL = 32


class Commands(click.Group):
    """Command group that turns every exception into a message and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - click's
        """Run the program and exit."""
        streams.prepare()
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            streams.show(error)
            status = error.exit_code
        except click.Abort:
            streams.write_message("Aborted!\n")
            status = 1
        except OSError as error:
            if error.filename is not None:
                fail(str(error))
            streams.end_without_output(error)  # click's own exit, as of --help
        finally:
            streams.settle()
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (CompileError, CacheMissError) as error:  # these have several lines
            streams.write_message(f"jitattn-cache: {printable(str(error))}\n")
            sys.exit(1)
        except JitAttnError as error:
            fail(str(error))


class Words(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A comma-separated list of words, from a set if there is one."""

    name = "list"

    def __init__(self, allowed: list[str] | None = None) -> None:
        self.allowed = allowed

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:  # noqa: ANN401 - click's
        """Split a value and check its words."""
        words = value if isinstance(value, list) else [word.strip() for word in value.split(",")]
        for word in words:
            if self.allowed is not None and word not in self.allowed:
                self.fail(f"{word!r} is none of {', '.join(self.allowed)}", param, ctx)
        return words


class Archs(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A comma-separated list of architectures: 80,86 or sm_80,sm_86."""

    name = "archs"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:  # noqa: ANN401 - click's
        """Split a value and return full architecture names."""
        if isinstance(value, list):
            return value
        try:
            return [arch_name(word) for word in value.split(",")]
        except JitAttnError as error:
            self.fail(str(error), param, ctx)


class Number(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """Integer in ASCII digits; `int` would accept the digits of every script."""

    name = "number"

    def __init__(self, least: int = 0) -> None:
        self.least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> int:  # noqa: ANN401 - click's
        """Parse a number and check its range."""
        number = value if isinstance(value, int) else number_in(str(value))
        if number is None or number < self.least:
            self.fail(f"{value!r}: it must be a number from {self.least} up", param, ctx)
        return number


def json_option(function: _Function) -> _Function:
    """Add the option --json, common to all commands."""
    return click.option("--json", "as_json", is_flag=True, help="one JSON value on stdout")(
        function
    )


def yes_option(function: _Function) -> _Function:
    """Add the options -y and --dry-run, common to all commands that delete."""
    function = click.option("-y", "--yes", is_flag=True, help="do not ask")(function)
    return click.option("--dry-run", is_flag=True, help="say what would go, delete nothing")(
        function
    )


def fail(message: str, status: int = 1) -> NoReturn:
    """Print a message on stderr and exit."""
    warn(message)
    sys.exit(status)


@contextmanager
def command_line() -> Iterator[None]:
    """Turn InvalidInputError into a command-line error: status 2."""
    try:
        yield
    except InvalidInputError as error:
        fail(str(error), 2)


def emit(value: object, as_json: bool, text: str, *, to_stderr: bool = False) -> None:
    """Print a result as JSON or as text."""
    line = f"{json.dumps(value) if as_json else printable(text)}\n"
    if to_stderr:
        streams.write_message(line)
    else:
        streams.write(line)


def confirm(question: str, yes: bool) -> None:
    """Ask before deleting; without a terminal, require -y."""
    if yes:
        return
    if not _is_asked():
        fail("this deletes kernels and cannot ask here: add --yes, or --dry-run to see", 2)
    click.confirm(one_line(question), abort=True, err=True)


def _is_asked() -> bool:
    """Return whether stdin is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def print_rows(
    columns: tuple[str, ...], rows: list[dict[str, Any]], droppable: tuple[str, ...] = ()
) -> None:
    """Print a table; on a narrow terminal, omit some of the `droppable` columns."""
    cells = [{name: one_line(row.get(name, "")) for name in columns} for row in rows]
    console = Console()
    if console.is_terminal:
        columns = fitting(columns, cells, console.width, droppable)
    else:
        console.width = sum(_width(name, cells) + 2 for name in columns)
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True)
    for row in cells:
        table.add_row(*(Text(row[name]) for name in columns))  # Text: brackets are not markup
    with console.capture() as captured:
        console.print(table)
    streams.write(captured.get())


def fitting(
    columns: tuple[str, ...], cells: list[dict[str, str]], width: int, droppable: tuple[str, ...]
) -> tuple[str, ...]:
    """Omit `droppable` columns, in their order, until the rest fits into `width`."""
    widths = {name: min(_width(name, cells), _WIDEST_CELL) + 2 for name in columns}
    for name in droppable:
        if sum(widths.values()) - 2 <= width:
            break
        widths.pop(name, None)
    return tuple(widths)


def _width(name: str, cells: list[dict[str, str]]) -> int:
    return max(len(text) for text in (name, *(row[name] for row in cells)))


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Report progress on stderr: a bar on a terminal, plain lines otherwise.

    Yields a function that takes the line of each step; empty lines are not printed.
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
                streams.write_message(f"[{done}/{total}] {printable(line)}\n")

        yield step


def warn(message: str) -> None:
    """Print a message on stderr as one line; file names and archives may contain line breaks."""
    streams.write_message(f"jitattn-cache: {one_line(message)}\n")


def own_cache(*, to_write: bool = False) -> DiskCache:
    """Return the user's cache; exit if there is none."""
    cache = user_cache()
    if cache is None:
        fail("no cache directory is to be had: set JITATTN_CACHE_DIR to one that you can write")
    mode = settings.cache_mode()
    if to_write and mode != "rw":
        fail(f"this writes to the cache, but JITATTN_CACHE={mode}", 2)
    return cache


def describe(spec: dict[str, str | int]) -> str:
    """Describe a kernel in a few words."""
    names = ("family", "arch", "dtype", "out_dtype", "head_dim", "head_dim_v", "mask")
    words = [str(spec[name]) for name in names if name in spec]
    if spec.get("function"):  # its text is long
        words.append(f"function {hashlib.sha256(str(spec['function']).encode()).hexdigest()[:8]}")
    return " ".join(words)

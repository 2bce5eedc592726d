"""Option types, questions, messages and signals, shared by the commands."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click

from jitattn.cache import settings
from jitattn.cache.disk import DiskCache, user_cache
from jitattn.cli import streams
from jitattn.errors import CacheMissError, CompileError, InvalidInputError, JitAttnError
from jitattn.jit import gpus
from jitattn.plan.choices import arch_name
from jitattn.spec.text import number_in, one_line, printable

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Stopped(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, with its own status."""


class Commands(click.Group):
    """Command group that turns every exception and signal into a message and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - click's
        """Run the program and exit."""
        streams.prepare()
        try:
            with _sigterm_raises():
                status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            streams.show(error)
            status = error.exit_code
        except click.Abort as error:
            streams.write_message("Aborted!\n")
            is_signal = isinstance(error.__cause__, KeyboardInterrupt)
            status = status_of(error.__cause__) if is_signal else 1
        except OSError as error:
            if error.filename is not None:
                fail(str(error))
            streams.end_without_output(error)  # click's own exit, as of --help
        finally:
            streams.settle()
        sys.exit(status if isinstance(status, int) else 0)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, each with its whole first sentence."""
        rows = [
            (name, command.get_short_help_str(limit=formatter.width * 8))
            for name in self.list_commands(ctx)
            if (command := self.get_command(ctx, name)) is not None
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

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
    """A comma-separated list of architectures: 80,86, sm_90, native (of the GPUs here)."""

    name = "archs"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:  # noqa: ANN401 - click's
        """Split a value and return full architecture names."""
        if isinstance(value, list):
            return value
        found: dict[str, None] = {}
        try:
            for word in value.split(","):
                names = gpus.archs() if word.strip() == "native" else [arch_name(word)]
                found.update(dict.fromkeys(names))
        except JitAttnError as error:
            self.fail(str(error), param, ctx)
        return list(found)


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


def status_of(signal_error: BaseException | None) -> int:
    """Return the exit status of a command that a signal ended, as a shell reports it."""
    number = signal.SIGTERM if isinstance(signal_error, Stopped) else signal.SIGINT
    return 128 + number


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Stopped`, so that worker processes end and drafts are deleted."""
    if threading.current_thread() is not threading.main_thread():  # as in a test of a caller
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


def warn(message: str) -> None:
    """Print a message on stderr as one line; file names and archives may contain line breaks."""
    streams.write_message(f"jitattn-cache: {one_line(message)}\n")


def own_cache(*, to_write: bool = False) -> DiskCache:
    """Return the user's cache; exit if there is none. It is made only to write to it."""
    cache = user_cache(make=to_write)
    if cache is None:
        fail("no cache directory is to be had: set JITATTN_CACHE_DIR to one that you can write")
    mode = settings.cache_mode()
    if to_write and mode != "rw":
        fail(f"this writes to the cache, but JITATTN_CACHE={mode}", 2)
    return cache

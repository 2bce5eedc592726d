"""Writes results to stdout completely, or ends the command with the reason.

Messages on stderr are optional: a command does its work even if they cannot be written.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Final, NoReturn, TextIO

import click

from jitattn.spec.text import one_line

#: Raised by newer versions of click for a group without a command.
_HELP: Final[tuple[type, ...]] = tuple(
    filter(None, [getattr(click.exceptions, "NoArgsIsHelpError", None)])
)


def prepare() -> None:
    """Reopen closed standard streams, and let the others write every character.

    Otherwise the next file that is opened would get the descriptor of standard output, and receive
    the output of libraries.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Write a result to stdout; exit if that fails."""
    if sys.stdout is None:
        end_without_output(OSError(errno.EBADF, "it is closed"))
    try:
        click.echo(text, nl=False)
    except OSError as error:
        end_without_output(error)


def write_message(text: str) -> None:
    """Write to stderr; ignore errors."""
    try:
        click.echo(text, nl=False, err=True)
    except OSError:
        _abandon(sys.stderr)


def is_watched() -> bool:
    """Return whether stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def show(error: click.ClickException) -> None:
    """Print click's message about an invalid command line."""
    if not isinstance(error, _HELP):
        error.message = one_line(error.message)  # type: ignore[misc]  # it may name files
    try:
        error.show()
    except OSError:
        _abandon(sys.stderr)


def settle() -> None:
    """Flush both streams; a failure at exit would change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _abandon(stream)


def end_without_output(error: OSError) -> NoReturn:
    """Exit with status 1 because stdout cannot be written."""
    _abandon(sys.stdout)
    if error.errno != errno.EPIPE:  # the reader has stopped: no message
        write_message(f"jitattn-cache: standard output cannot be written: {error.strerror}\n")
    sys.exit(1)


def _abandon(stream: TextIO | None) -> None:
    """Redirect a stream to os.devnull, so that its buffer is not written again at exit.

    See the note on SIGPIPE in Python's `signal` documentation.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]  # None is suppressed
        os.close(nowhere)

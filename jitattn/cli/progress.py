"""Reports progress on stderr: a bar with kernel, rate and time left, or plain lines with them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

from jitattn.cli import streams
from jitattn.cli.words import duration
from jitattn.spec.text import one_line, printable

_TOO_SOON: Final = 0.5  # seconds after which a rate means something, and steps
_TOO_FEW: Final = 2


class Step(Protocol):
    """Reports that one more thing is done."""

    def __call__(self, line: str, current: str = "") -> None:
        """Report it.

        Parameters
        ----------
        line : str
            What a log shows of it; nothing if empty.
        current : str
            What a terminal shows beside the bar; `line` if empty.
        """


@contextmanager
def progress(title: str, total: int) -> Iterator[Step]:
    """Report progress on stderr: a bar on a terminal, plain lines otherwise."""
    console = Console(stderr=True)
    pace = Pace(total)
    columns = (
        TextColumn(title),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[pace]}"),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, pace="")

        def step(line: str, current: str = "") -> None:
            pace.step()
            bar.update(
                task, advance=1, description=escape(one_line(current or line)), pace=pace.text()
            )
            if line and not console.is_terminal:
                place = ", ".join(filter(None, (f"{pace.done}/{total}", pace.left())))
                streams.write_message(f"[{place}] {printable(line)}\n")

        yield step


class Pace:
    """Rate and time left of work that has `total` steps."""

    def __init__(self, total: int) -> None:
        self.done = 0
        self._total = total
        self._start = time.monotonic()

    def step(self) -> None:
        """Count one step."""
        self.done += 1

    def left(self) -> str:
        """Return the time left in words: 8 s left; empty where it is not known, and at the end."""
        seconds = time.monotonic() - self._start
        if not _TOO_FEW < self.done < self._total or seconds < _TOO_SOON:
            return ""
        return f"{duration(seconds / self.done * (self._total - self.done))} left"

    def text(self) -> str:
        """Return rate and time left: 1.8/s, 8 s left."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return ", ".join(filter(None, (f"{self.done / seconds:.1f}/s", self.left())))

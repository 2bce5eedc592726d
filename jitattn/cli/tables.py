"""Prints tables. A narrow terminal shortens paths, then omits columns; numbers are never cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jitattn.cli import streams
from jitattn.spec.text import one_line

_GAP: Final = 2  # columns between two cells
_SHORTEST: Final = 10  # characters that are left of an elastic cell


def print_rows(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    droppable: Sequence[str] = (),
    elastic: Collection[str] = (),
    numbers: Collection[str] = (),
) -> None:
    """Print a table.

    Parameters
    ----------
    columns : sequence of str
    rows : sequence of mapping
        Cells by column.
    droppable : sequence of str
        Columns that a narrow terminal omits, in this order.
    elastic : collection of str
        Columns whose cells a narrow terminal shortens before that.
    numbers : collection of str
        Columns that are aligned to the right.
    """
    cells = [{name: one_line(row.get(name, "")) for name in columns} for row in rows]
    console = Console()
    widths = {name: max(map(len, (name, *(row[name] for row in cells)))) for name in columns}
    if console.is_terminal:
        widths = fitting(widths, console.width, droppable, elastic)
    # A terminal that is too narrow all the same breaks lines, and shows everything.
    console.width = sum(widths.values()) + _GAP * len(widths)
    table = Table(box=None, pad_edge=False)
    for name in widths:
        table.add_column(name, no_wrap=True, justify="right" if name in numbers else "left")
    for row in cells:
        # Text: brackets are not markup.
        table.add_row(*(Text(ending(row[name], width)) for name, width in widths.items()))
    with console.capture() as captured:
        console.print(table)
    streams.write(captured.get())


def fitting(
    widths: Mapping[str, int], room: int, droppable: Sequence[str], elastic: Collection[str]
) -> dict[str, int]:
    """Return the widths of the columns that fit into `room` characters.

    Elastic columns get what the others leave; columns are dropped only where that is too little.
    """
    least = {
        name: min(width, max(_SHORTEST, len(name))) if name in elastic else width
        for name, width in widths.items()
    }
    for name in droppable:
        if _in_all(least) <= room:
            break
        least.pop(name, None)
    left = max(0, room - _in_all(least))
    fitted = dict(least)
    for name in elastic:
        if name in fitted:
            more = min(left, widths[name] - fitted[name])
            fitted[name] += more
            left -= more
    return fitted


def ending(text: str, width: int) -> str:
    """Return the end of a text that is too long, the part of a path that tells it from others."""
    return text if len(text) <= width else f"…{text[len(text) - width + 1 :]}"


def _in_all(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)

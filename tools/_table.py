"""Prints tables and progress for the tools: with rich on a terminal, else plain."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def say(text: str = "") -> None:
    """Print a line and flush."""
    print(text, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; align columns of numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [
        bool(cells) and all(_is_number(row[column_idx]) for row in cells)
        for column_idx in range(len(columns))
    ]
    if sys.stdout.isatty() and _print_rich(title, columns, cells, right):
        return
    widths = [
        max([len(column), *(len(row[column_idx]) for row in cells)])
        for column_idx, column in enumerate(columns)
    ]
    say(f"\n{title}")
    lines = [list(columns), ["-" * width for width in widths], *cells]
    for line in lines:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        )
        say("  ".join(padded).rstrip())


def _print_rich(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]
) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=title, title_justify="left")
    for column, is_right in zip(columns, right, strict=True):
        table.add_column(column, justify="right" if is_right else "left")
    for row in cells:
        table.add_row(*row)
    Console().print(table)
    return True


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("x% "))
    except ValueError:
        return cell in ("", "-")
    return True

"""Sanitizes text from outside: shows control characters as escapes, parses numbers strictly.

File names, metadata, environment variables and compiler logs may hold anything. An escape sequence
rewrites a terminal, a line break forges a line of a log, and `int` reads the digits of every script
and raises on numbers of thousands of digits.
"""

from __future__ import annotations

import logging
import re
from typing import Final

_NUMBER: Final = re.compile(r"[0-9]{1,15}")


def one_line(value: object) -> str:
    r"""Return the text of a value on one line, with unprintable characters as \x1b or \n."""
    text = str(value)
    return text if text.isprintable() else "".join(map(_shown, text))


def printable(text: str) -> str:
    """Return text as `one_line` does, but keep its line breaks and tabs."""
    return "".join(one if one in "\n\t" else _shown(one) for one in text)


def number_in(text: str) -> int | None:
    """Parse a number of at most 15 ASCII digits; None if the text is anything else."""
    return int(text) if _NUMBER.fullmatch(text) else None


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the first three numbers of a version: '13.0.88.dev1' → (13, 0, 88)."""
    return tuple(int(part) for part in re.findall(r"[0-9]{1,6}", text)[:3])


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


class OneLine(logging.Filter):
    """Makes every record of a logger a single line of printable characters."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the message; the record always passes."""
        record.msg, record.args = one_line(record.getMessage()), ()
        return True

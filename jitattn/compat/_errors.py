"""Errors in the style of the systems behind the doors."""

from __future__ import annotations

from jitattn.errors import InvalidInputError


class CheckFailedError(InvalidInputError, AssertionError):
    """A rule that the original asserts: callers may catch it as either."""


def check(holds: bool, message: str) -> None:
    """Refuse what breaks a rule.

    Raises
    ------
    CheckFailedError
    """
    if not holds:
        raise CheckFailedError(message)

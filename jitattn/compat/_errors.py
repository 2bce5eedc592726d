"""Translates the core's errors to the exception types and argument names of a front door.

A door's function is decorated by `errors_as`: an error of the core below it is then also of the
original's type, and names the door's arguments::

    @errors_as(ExtensionError, {"q": "query", "k": "key", "v": "value"})
    def forward(query, key, value): ...

Conditions that the original asserts are checked by the door, with `check`; these errors pass.
`UnsupportedError` needs nothing: it is a NotImplementedError, and so a RuntimeError.
"""

from __future__ import annotations

import functools
import re
from types import MappingProxyType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_P = ParamSpec("_P")
_R = TypeVar("_R")


class DoorError(InvalidInputError):
    """An argument of a door breaks a rule. Raised as one of the types below."""


class CheckFailedError(DoorError, AssertionError):
    """An assertion of the original fails; also an AssertionError."""


class ExtensionError(DoorError, RuntimeError):
    """A TORCH_CHECK of the original's extension fails; also a RuntimeError."""


def check(holds: bool, message: str) -> None:
    """Raise unless a condition holds.

    Raises
    ------
    CheckFailedError
    """
    if not holds:
        raise CheckFailedError(message)


def errors_as(
    kind: type[DoorError], names: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function to raise errors of the original's type too; free unless it raises.

    Parameters
    ----------
    kind : type
        `CheckFailedError` or `ExtensionError`. A `DoorError` keeps the kind that it has.
    names : mapping of str to str
        What the door says for a word of the core's, or for a phrase: ``{"q": "query"}``.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except DoorError:
                raise
            except InvalidInputError as error:
                raise kind(in_words(error, names)) from error

        return call

    return decorate


def in_words(error: InvalidInputError, names: Mapping[str, str]) -> str:
    """Return an error message with the core's argument names replaced by the door's."""
    if not names:
        return str(error)
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(re.escape(name) for name in longest_first)
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda found: names[found[0]], str(error))

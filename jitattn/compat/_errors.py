"""Errors of the kinds that the systems behind the doors raise, in the words of the doors.

A door's function stands under `errors_as`: what the core refuses below it is then also of the
original's kind, and speaks of the door's arguments::

    @errors_as(ExtensionError, {"q": "query", "k": "key", "v": "value"})
    def forward(query, key, value): ...

What the original asserts before, a door refuses itself, with `check`; that passes through.
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
    """An argument of a door breaks a rule. Raised as one of the kinds below."""


class CheckFailedError(DoorError, AssertionError):
    """A rule that the original asserts: callers may catch it as either."""


class ExtensionError(DoorError, RuntimeError):
    """A rule that the original's extension checks (TORCH_CHECK): callers may catch it as either."""


def check(holds: bool, message: str) -> None:
    """Refuse what breaks a rule.

    Raises
    ------
    CheckFailedError
    """
    if not holds:
        raise CheckFailedError(message)


def errors_as(
    kind: type[DoorError], names: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let what a function refuses be of the original's kind too; costs nothing where it does not.

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
    """Return the message of an error with a door's words in it, for whole words of the core's."""
    if not names:
        return str(error)
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(re.escape(name) for name in longest_first)
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda found: names[found[0]], str(error))

"""Compares a call between ranks before anything travels, and tells all ranks what is wrong."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from jitattn.cache import settings
from jitattn.distributed.members import told
from jitattn.errors import CommunicationError, InvalidInputError, JitAttnError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch.distributed import ProcessGroup

#: Signatures that the ranks of a group have agreed on.
_agreed: Final[weakref.WeakKeyDictionary[ProcessGroup, set[Hashable]]] = weakref.WeakKeyDictionary()
_MOST_AGREED: Final = 4096


class Signature(NamedTuple):
    """What a rank asks for.

    Attributes
    ----------
    alike : dict
        What must be equal on all ranks, by the argument's name.
    own : tuple of int
        Lengths, which may differ.
    """

    alike: dict[str, str]
    own: tuple[int, int]

    @property
    def key(self) -> Hashable:
        """What it is recognised by."""
        return tuple(self.alike.items()), self.own


def agree(
    group: ProcessGroup, make: Callable[[], Signature], *, each_time: bool
) -> list[tuple[int, int]] | None:
    """Compare what the ranks of a group ask for; return the lengths of all.

    Parameters
    ----------
    group : ProcessGroup
    make : callable
        Checks this rank's arguments and returns their signature. Its errors go to all ranks.
    each_time : bool
        Compare at every call; else only a signature that this rank has not met.

    Returns
    -------
    list of (query rows, keys) by rank; None if nothing was compared

    Raises
    ------
    InvalidInputError, UnsupportedError
        On all ranks: an argument of one breaks a rule, or differs.
    CommunicationError
        A rank has gone.
    """
    own: Signature | None = None
    error: JitAttnError | None = None
    try:
        own = make()
    except (InvalidInputError, UnsupportedError) as found:
        error = found
    known = _agreed.setdefault(group, set())
    if own is not None and not (each_time or settings.debug()) and own.key in known:
        return None
    what = (type(error).__name__, str(error)) if own is None else own
    try:
        answers = told(group, what)
    except CommunicationError:
        if error is not None:  # this rank's own reason; the others made the call without asking
            raise error from None
        raise
    _refuse(answers, error)
    if own is not None:
        if len(known) >= _MOST_AGREED:
            known.clear()
        known.add(own.key)
    return [one.own for one in answers]


def _refuse(answers: list[Any], error: JitAttnError | None) -> None:
    """Raise the error of the first rank that has one, or name the first difference."""
    for rank, one in enumerate(answers):
        if isinstance(one, Signature):
            continue
        kind, message = one
        wanted = UnsupportedError if kind == "UnsupportedError" else InvalidInputError
        raise wanted(f"rank {rank}: {message}") from error
    first = answers[0].alike
    for rank, one in enumerate(answers[1:], start=1):
        for name in (*first, *(name for name in one.alike if name not in first)):
            ours, theirs = first.get(name, "not given"), one.alike.get(name, "not given")
            if ours != theirs:
                raise InvalidInputError(
                    f"{name} is {theirs} on rank {rank} and {ours} on rank 0: it must be the same "
                    "on every rank of the group"
                )

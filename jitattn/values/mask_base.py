"""What masks share: checks of their fields, and what kernels are told of a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jitattn.errors import InvalidInputError
from jitattn.spec.enums import MaskKind
from jitattn.values.given import integer

if TYPE_CHECKING:
    from collections.abc import Mapping

_BLOCK_SIZES = (8, 16, 32, 64, 128)


class KernelMask(NamedTuple):
    """A positional rule as kernels take it."""

    kind: MaskKind
    bottom_right: bool = False  #: the diagonal of each sequence is moved by its Lkv - Lq
    diagonal: int = 0  #: beside it
    #: Of `ScoreArguments`, with `left` without Lkv - Lq; left out: as without a rule.
    arguments: Mapping[str, int] = {}


def is_count(mask: object, name: str, value: object, least: int, most: int) -> bool:
    """Return whether a field is an integer in this range; convert numpy integers to int."""
    number = integer(value)
    if number is None or not least <= number <= most:
        return False
    if type(value) is not int and value is getattr(mask, name):
        object.__setattr__(mask, name, number)
    return True


def check_block_size(mask: object, size: object) -> None:
    """Refuse a block size that block lists do not have."""
    if not is_count(mask, "block_size", size, 0, 128) or integer(size) not in _BLOCK_SIZES:
        raise InvalidInputError(
            f"{type(mask).__name__}(block_size={size!r}): it must be one of {_BLOCK_SIZES}"
        )

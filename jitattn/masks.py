"""Mask values: who may see whom. Frozen, comparable, free of tensors' contents and of torch.

True means attend. Further kinds join this module as values of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from jitattn.errors import InvalidInputError

Align: TypeAlias = Literal["bottom_right", "top_left"]


@dataclass(frozen=True, slots=True)
class Full:
    """Every query sees every key."""


@dataclass(frozen=True, slots=True)
class Causal:
    """A query sees its own position and everything before it.

    Parameters
    ----------
    align : "bottom_right" or "top_left"
        Which corner of the [Lq, Lkv] score matrix the diagonal goes through. Bottom-right (the
        default) lets the last query see every key: key <= query + Lkv - Lq. Top-left lets the
        first query see the first key only: key <= query. They differ when Lq != Lkv.
    """

    align: Align = "bottom_right"

    def __post_init__(self) -> None:
        """Refuse an unknown corner by name."""
        if self.align not in get_args(Align):
            raise InvalidInputError(
                f"Causal(align={self.align!r}): align must be one of {get_args(Align)}"
            )


Mask: TypeAlias = Full | Causal

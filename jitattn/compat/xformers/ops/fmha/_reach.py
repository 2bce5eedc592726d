"""Which keys a query sees by its position: the part of a bias that needs no tensor."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from jitattn.values.masks import Causal, Full, MaskMod, Window

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask


class Reach(NamedTuple):
    """A window around a query's position; of each sequence where there are several."""

    left: int | None = None  #: visible keys before the position; None for all
    right: int | None = None  #: visible keys after it; None for all
    from_bottom_right: bool = True  #: whether the last query is at the last key, or the first both

    def seen(self, num_queries: int, num_keys: int, device: torch.device | str) -> Tensor:
        """Return which pairs are visible, bool [num_queries, num_keys]."""
        shift = num_keys - num_queries if self.from_bottom_right else 0
        rows = torch.arange(num_queries, device=device)[:, None] + shift
        keys = torch.arange(num_keys, device=device)[None, :]
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        if self.left is not None:
            seen &= keys >= rows - self.left
        if self.right is not None:
            seen &= keys <= rows + self.right
        return seen

    def rule(self, lengths_are_equal: bool) -> Mask:
        """Return jitattn's mask.

        Parameters
        ----------
        lengths_are_equal : bool
            Whether every sequence has as many queries as keys, so that both corners are one.
        """
        make = _made if is_dynamo_compiling() else _shared
        return make(self, lengths_are_equal)


def _made(reach: Reach, lengths_are_equal: bool) -> Mask:
    left, right, from_bottom_right = reach
    if left is None and right is None:
        return Full()
    if left is None and right == 0:
        return Causal("bottom_right" if from_bottom_right else "top_left")
    if from_bottom_right or lengths_are_equal:
        return Window(left, right)
    causal = Causal("top_left") if right == 0 else Full()
    return causal & MaskMod(_around(left, right))


def _around(left: int | None, right: int | None) -> Any:  # noqa: ANN401 - a function of symbols
    """Return the function of a window that counts from the first query and the first key."""
    before = 2**30 if left is None else min(left, 2**30)
    after = 2**30 if right is None else min(right, 2**30)

    def is_near(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401
        del b, h
        return (kv_idx >= q_idx - before) & (kv_idx <= q_idx + after)

    return is_near


_shared: Final = functools.lru_cache(maxsize=256)(_made)

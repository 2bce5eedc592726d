"""Bounds of the distance that positional rules let be seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jitattn.distributed.pieces import Bounds
from jitattn.values.masks import BlockSparse, Causal, LocalStride, PerHead, Window

if TYPE_CHECKING:
    from jitattn.values.masks import Rule


def bounds_of(rule: Rule, shift: int | None = None) -> Bounds:
    """Return bounds of the distances that a rule lets be seen.

    Parameters
    ----------
    rule : Rule
    shift : int, optional
        Position of query 0 among the keys, in place of the rule's own.
    """
    if isinstance(rule, Causal):
        top_left = 0 if rule.align == "top_left" else None
        return Bounds(None, 0, 0, top_left if shift is None else shift)
    if isinstance(rule, Window):
        return Bounds(rule.left, rule.right, rule.keep_first, shift, rule.full_on_decode)
    if isinstance(rule, BlockSparse):
        own = rule.first_row if shift is None else shift
        return Bounds(None, 0 if rule.causal else None, 0, own)
    if isinstance(rule, LocalStride):
        return Bounds(None, 0 if rule.causal else None, 0, shift)
    if isinstance(rule, PerHead):
        each = [bounds_of(one) for one in rule.rules]
        return Bounds(
            _widest([one.left for one in each]),
            _widest([one.right for one in each]),
            max((one.keep_first for one in each), default=0),
            shift,
            any(one.full_on_decode for one in each),
        )
    return Bounds(None, None, 0, shift)


def _widest(bounds: list[int | None]) -> int | None:
    known = [one for one in bounds if one is not None]
    return max(known) if known and len(known) == len(bounds) else None

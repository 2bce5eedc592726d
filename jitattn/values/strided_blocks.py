"""Tells which blocks of keys a block of queries sees under a local + stride rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import LocalStride


def sees_block(rule: LocalStride, row: Tensor, column: Tensor, shift: Tensor | int = 0) -> Tensor:
    """Return whether blocks of queries see blocks of keys, causality and dense heads aside.

    Parameters
    ----------
    row, column : Tensor, broadcastable
        Numbers of the blocks.
    shift : Tensor or int
        Offset of a head's stride; unused if the rule is not causal.
    """
    left, right = rule.local
    if rule.causal:
        return (row - column < left) | ((column + shift) % rule.vert_stride == 0)
    outside = (row - column - left + 1).clamp(min=0) + (column - row - right + 1).clamp(min=0)
    return outside % rule.vert_stride == 0

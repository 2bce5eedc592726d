"""Numbers as callers give them: Python's, numpy's, anything that says it is one.

This module imports no torch.
"""

from __future__ import annotations

import math
import numbers
import operator


def real(value: object) -> float | None:
    """Return a real number as a float (an infinite one if it is too large), or None if it is none.

    Bools are no numbers, nor are tensors, whose value a device may have to be asked for.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if operator.gt(value, 0) else -math.inf


def integer(value: object) -> int | None:
    """Return an integer of any kind as an int, or None if it is none; bools are none."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return operator.index(value)

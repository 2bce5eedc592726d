"""Converts numbers of callers: Python's, numpy's, and any type that implements them.

This module imports no torch.
"""

from __future__ import annotations

import math
import numbers
import operator


def real(value: object) -> float | None:
    """Convert a real number to float (infinite if too large); None for anything else.

    Bools are refused, and tensors, as reading their value may synchronize with a device.
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
    """Convert an integer of any type to int; None for anything else, bools included."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return operator.index(value)

"""Remembers which rotary tables were checked."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

import torch

from jitattn.values.rotary import Rotary

if TYPE_CHECKING:
    from torch import Tensor

#: Checked tables, by their identities: held weakly, as they are large. With their sizes, which
#: `resize_` changes.
_checked: dict[tuple[int, int], tuple[weakref.ref[Tensor], weakref.ref[Tensor], int]] = {}
_MOST_CHECKED: Final = 256


def rotary_of(cos: Tensor, sin: Tensor, interleaved: bool) -> Rotary:
    """Return the value of two tables, which are checked unless they were in a call before.

    Raises
    ------
    InvalidInputError
        The tables are not matrices, or differ in shape, dtype or device.
    """
    if torch.compiler.is_compiling():
        return Rotary(cos, sin, interleaved=interleaved)
    known = _checked.get((id(cos), id(sin)))
    if known is not None:
        of_cos, of_sin, size = known
        if of_cos() is cos and of_sin() is sin and cos.numel() == sin.numel() == size:
            value = Rotary.__new__(Rotary)
            hold = object.__setattr__
            hold(value, "cos", cos)
            hold(value, "sin", sin)
            hold(value, "interleaved", interleaved)
            return value
    value = Rotary(cos, sin, interleaved=interleaved)
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked[id(cos), id(sin)] = (weakref.ref(cos), weakref.ref(sin), cos.numel())
    return value

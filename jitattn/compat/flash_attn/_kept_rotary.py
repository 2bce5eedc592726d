"""Remembers which rotary tables were checked."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from jitattn.values.rotary import Rotary
from jitattn.values.tensors import PLAIN

if TYPE_CHECKING:
    from torch import Tensor

#: Shapes, strides, dtypes and devices of two tables.
_Form: TypeAlias = tuple[Any, ...]
#: Checked tables, by their identities: held weakly, as they are large. With what `resize_`,
#: assigning to ``data`` and the like change.
_checked: dict[tuple[int, int], tuple[weakref.ref[Tensor], weakref.ref[Tensor], _Form]] = {}
_MOST_CHECKED: Final = 256


def rotary_of(cos: Tensor, sin: Tensor, interleaved: bool) -> Rotary:
    """Return the value of two tables, which are checked unless they were in a call before.

    Raises
    ------
    InvalidInputError
        The tables are not matrices, or differ in shape, dtype or device.
    """
    are_plain = type(cos) in PLAIN and type(sin) in PLAIN
    if torch.compiler.is_compiling() or not are_plain:
        return Rotary(cos, sin, interleaved=interleaved)
    now = (cos.shape, sin.shape, cos.stride(), sin.stride(), cos.dtype, sin.dtype, cos.device,
           sin.device)  # fmt: skip
    known = _checked.get((id(cos), id(sin)))
    if known is not None:
        of_cos, of_sin, form = known
        if of_cos() is cos and of_sin() is sin and now == form:
            value = Rotary.__new__(Rotary)
            hold = object.__setattr__
            hold(value, "cos", cos)
            hold(value, "sin", sin)
            hold(value, "interleaved", interleaved)
            return value
    value = Rotary(cos, sin, interleaved=interleaved)
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked[id(cos), id(sin)] = (weakref.ref(cos), weakref.ref(sin), now)
    return value

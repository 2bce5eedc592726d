"""Functions of a query and a key that say what is seen, and how they are combined.

`MaskMod` (masks.py) is one as a mask. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

#: Positions of the first queries among the keys, as functions count.
QOffset: TypeAlias = "int | Tensor | Literal['bottom_right']"


def check_q_offset(name: str, offset: object) -> None:
    """Refuse what is no offset of queries.

    Raises
    ------
    InvalidInputError
    """
    shape = getattr(offset, "shape", None)
    is_vector = shape is not None and len(shape) == 1
    if not (is_vector or type(offset) is int or (shape is None and offset == "bottom_right")):
        what = repr(offset) if shape is None else f"a tensor {list(shape)}"
        raise InvalidInputError(
            f'{name} is {what}: it must be an int, a tensor [B], or "bottom_right"'
        )


@dataclass(frozen=True, slots=True)
class FunctionOfPairs:
    """A function ``f(b, h, q_idx, kv_idx) -> bool``, or what `&`, `|` and `~` make of several."""

    function: Callable[[Any, Any, Any, Any], Any]
    q_offset: QOffset = 0

    def __post_init__(self) -> None:
        """Refuse what is no function, and another offset."""
        if not callable(self.function):
            raise InvalidInputError(
                f"MaskMod({self.function!r}): it must be a function of (b, h, q_idx, kv_idx)"
            )
        check_q_offset("MaskMod(q_offset=...)", self.q_offset)

    def moved(self, q_offset: QOffset) -> Self:
        """Return the mask with an offset for those of its functions that have none."""
        kind, parts = self.parts
        if kind:
            return self._made(kind, *(part.moved(q_offset) for part in parts))
        has_own = not (type(self.q_offset) is int and self.q_offset == 0)
        return self if has_own else type(self)(self.function, q_offset)

    def both(self, other: Self) -> Self:
        """Return the intersection with another function, as `&` does."""
        return self._made("and", self, other)

    @property
    def parts(self) -> tuple[str, tuple[Self, ...]]:
        """How it is made of others: "and", "or" or "not", and these; "" if it is not."""
        function = self.function
        return (function.kind, function.parts) if isinstance(function, _Made) else ("", ())

    def __or__(self, other: object) -> Self:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self._made("or", self, other)

    def __invert__(self) -> Self:
        return self._made("not", self)

    def _made(self, kind: str, *parts: Self) -> Self:
        return type(self)(_Made(kind, parts))


@dataclass(frozen=True, slots=True)
class _Made:
    """The function of one that is made of others, which `FunctionOfPairs.parts` takes apart."""

    kind: str
    parts: tuple[Any, ...]

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401
        raise InvalidInputError("a combined MaskMod is no function: call its parts")

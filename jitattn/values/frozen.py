"""`Frozen`: what values of slots have in common that are set once, and then never again."""

from __future__ import annotations

from typing import Any


class Frozen:
    """A value that can be copied, deep-copied and pickled, but not changed.

    Such a value holds tensors, which are not compared: it is equal to itself alone, and hashed by
    identity. A copy is another value, of the same tensors; a deep copy has its own.
    """

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted")

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for kind in type(self).__mro__
            for name in getattr(kind, "__slots__", ())
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

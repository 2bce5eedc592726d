"""`Frozen`: base of immutable values with slots."""

from __future__ import annotations

from typing import Any


class Frozen:
    """Immutable value that can be copied, deep-copied and pickled.

    It holds tensors, which are not compared: a value equals only itself, and is hashed by identity.
    A copy is another value with the same tensors; a deep copy has its own tensors.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """Return its fields; of tensors, dtype and shape."""
        held = self.__getstate__().items()
        shown = (
            f"{name.lstrip('_')}={short_text(value)}" for name, value in held if value is not None
        )
        return f"{type(self).__name__}({', '.join(shown)})"

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


def short_text(value: object) -> str:
    """Return the text of a value; of a tensor, dtype and shape: bool[2, 7]."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return repr(value)
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"

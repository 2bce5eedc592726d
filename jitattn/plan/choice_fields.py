"""Reads and checks the fields of one choice; errors name the choice, the field and the value.

A choice comes from a file or a command line, so a value may be of any type that JSON, TOML or a
caller knows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, NoReturn, TypeAlias

from jitattn.errors import InvalidInputError
from jitattn.spec.enums import RowClass
from jitattn.spec.text import number_in

#: One table of a spec file.
Choice: TypeAlias = Mapping[str, Any]
MAX_HEAD_DIM: Final = 256
MAX_COMBINATIONS: Final = 100_000
DEFAULTS: Final[dict[str, tuple[str | int, ...]]] = {
    "dtype": ("fp16", "bf16"),
    "head_dim": (64, 128),
    "mask": ("full", "causal"),
    "groups": (1,),
}


class Fields:
    """The fields of one choice, and its place in the file or command line."""

    def __init__(self, choice: Choice, where: str) -> None:
        self.choice = choice
        self.where = where

    def refuse(self, reason: str) -> NoReturn:
        """Raise an error that names this choice."""
        raise InvalidInputError(f"{self.where}: {reason}")

    def check_names(self, known: Collection[str], shown: Iterable[str]) -> None:
        """Refuse unknown or empty fields, and lists with too many combinations."""
        for name in self.choice:
            if name not in known:
                self.refuse(f"unknown field {name!r}; the fields are {', '.join(shown)}")
            if not self.values(name):
                self.refuse(f"{name} is missing or empty")
        count = math.prod(max(1, len(self.values(name))) for name in known)
        if count > MAX_COMBINATIONS:
            self.refuse(
                f"its lists stand for {count} combinations: at most {MAX_COMBINATIONS} in one "
                "choice; split it"
            )

    def values(self, name: str) -> list[Any]:
        """Return the values of a field, or its defaults."""
        value = self.choice.get(name, DEFAULTS.get(name, ()))
        return list(value) if isinstance(value, list | tuple) else [value]

    def words(self, name: str, allowed: Collection[str]) -> list[Any]:
        """Return the values of a field with a fixed vocabulary."""
        values = self.values(name)
        for value in values:
            if value not in list(allowed):
                self.refuse(f"{name}={value!r}: it must be one of {', '.join(allowed)}")
        return values

    def numbers(self, name: str) -> list[int]:
        """Return the values of an integer field."""
        return [self._number(name, value, "a number") for value in self.values(name)]

    def head_dims(self) -> list[tuple[int, int]]:
        """Return the head dims of q and of v."""
        return [self._head_dims(value) for value in self.values("head_dim")]

    def row_classes(self) -> list[RowClass]:
        """Return the row classes of a choice; empty if it is for all of them."""
        classes = {row.name.lower(): row for row in RowClass}
        return [classes[word] for word in self.words("rows", classes)]

    def _head_dims(self, value: object) -> tuple[int, int]:
        dim_v = self.choice.get("head_dim_v")
        first, colon, second = str(value).partition(":")
        if colon and dim_v is not None:
            self.refuse(f"head_dim={value!r} and head_dim_v={dim_v!r}: give one")
        dim = self._head_dim("head_dim", first)
        if dim_v is not None:
            return dim, self._head_dim("head_dim_v", dim_v)
        return dim, self._head_dim("head_dim", second) if colon else dim

    def _head_dim(self, name: str, value: object) -> int:
        rule = f"from 1 to {MAX_HEAD_DIM}, as in 64, or 192:128 where v's differs"
        dim = self._number(name, value, rule)
        if not 1 <= dim <= MAX_HEAD_DIM:
            self._refuse_number(name, value, rule)
        return dim

    def _number(self, name: str, value: object, rule: str) -> int:
        number = None if isinstance(value, bool) else number_in(str(value).strip())
        if number is None:
            self._refuse_number(name, value, rule)
        return number

    def _refuse_number(self, name: str, value: object, rule: str) -> NoReturn:
        what = f"{name}: head dim " if name.startswith("head_dim") else f"{name}="
        self.refuse(f"{what}{value!r}: it must be {rule}")

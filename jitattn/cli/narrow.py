"""Narrows the choices of presets and files by the options of a command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jitattn.errors import InvalidInputError
from jitattn.plan.choice_fields import Choice


def narrowed(
    entries: Iterable[tuple[str, Choice]], options: Mapping[str, Any]
) -> list[tuple[str, Choice]]:
    """Restrict choices to the values that options name.

    A field that a choice names keeps the values that both have; one that it leaves open gets those
    of the options. A choice with nothing left is dropped.

    Parameters
    ----------
    entries : iterable of (str, mapping)
        Choices, each with its place.
    options : mapping
        Fields of a choice, each a value or a list.

    Raises
    ------
    InvalidInputError
        Nothing is left of any choice.
    """
    found: list[tuple[str, Choice]] = []
    offered = {name: dict[str, None]() for name in options}
    for place, choice in entries:
        less = dict(choice)
        for name, value in options.items():
            wanted = _values(value)
            named = _named(name, choice)
            if named is None:
                less[name] = wanted
                continue
            offered[name].update((_text(name, one), None) for one in named)
            texts = {_text(name, one) for one in wanted}
            less[name] = [one for one in named if _text(name, one) in texts]
            if name == "head_dim":
                less.pop("head_dim_v", None)
        if all(_values(less[name]) for name in options):
            found.append((place, less))
    if not found:
        text = ", ".join(f"{name}={','.join(map(str, _values(options[name])))}" for name in options)
        have = "; ".join(f"{name}: {', '.join(values)}" for name, values in offered.items())
        raise InvalidInputError(
            f"nothing is left of the presets and files with {text}; they have {have}"
        )
    return found


def _named(name: str, choice: Choice) -> list[Any] | None:
    """Return the values of a field that a choice names; head dims as D:Dv; None if it is open."""
    if name not in choice:
        return None
    values = _values(choice[name])
    if name == "head_dim" and "head_dim_v" in choice:
        return [f"{dim}:{dim_v}" for dim in values for dim_v in _values(choice["head_dim_v"])]
    return values


def _text(name: str, value: object) -> str:
    """Return a value as options write it: 64 and "64:64" are the same head dims."""
    text = str(value).strip()
    first, colon, second = text.partition(":")
    if name == "arch":
        return text.removeprefix("sm_")
    return first if name == "head_dim" and colon and first == second else text


def _values(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]

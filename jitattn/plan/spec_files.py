"""Reads spec files: TOML, JSON, or JSON lines with one choice each, as ``JITATTN_RECORD`` writes.

A malformed line is skipped, and no other: a record is written by programs that may be killed at any
moment.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from jitattn.errors import InvalidInputError
from jitattn.spec.text import one_line

if TYPE_CHECKING:
    from pathlib import Path

    from jitattn.plan.choice_fields import Choice

_MAX_FILE_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SpecFile:
    """The choices of a file, each with its place, and the faults of its other entries."""

    entries: list[tuple[str, Choice]]
    faults: list[str]


def read(path: Path) -> SpecFile:
    """Read a spec file.

    Raises
    ------
    InvalidInputError
        It cannot be read, is none of the three kinds, or holds nothing but faults.
    """
    name = f"spec file {one_line(path)}"
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{name}: it cannot be read ({error})") from error
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidInputError(f"{name}: it is larger than {_MAX_FILE_BYTES} bytes")
    try:
        raw = tomllib.loads(content.decode()) if path.suffix == ".toml" else json.loads(content)
        found = [(f"{name}, kernel {number}", one) for number, one in _kernels(path, raw)]
    except (ValueError, RecursionError) as error:
        lines = [] if path.suffix == ".toml" else _lines(path, content)
        if not lines:
            raise InvalidInputError(f"{name}: {error}") from error
        found = [(f"{name}, line {number}", one) for number, one in lines]
    entries: list[tuple[str, Choice]] = [
        (place, one) for place, one in found if isinstance(one, dict)
    ]
    faults = [
        f"{place}: {one if isinstance(one, ValueError) else 'it is no table of fields'}"
        for place, one in found
        if not isinstance(one, dict)
    ]
    if faults and not entries:
        raise InvalidInputError(faults[0])
    return SpecFile(entries, faults)


def _kernels(path: Path, raw: Any) -> list[tuple[int, Any]]:  # noqa: ANN401 - any JSON or TOML
    """List the numbered choices of a document."""
    kernels = raw
    if isinstance(raw, dict):
        is_one_choice = path.suffix != ".toml" and "kernels" not in raw  # a record of one line
        kernels = [raw] if is_one_choice else raw.get("kernels")
    if not isinstance(kernels, list):
        raise ValueError(  # noqa: TRY004 - as any other fault of a file
            "it must hold a list 'kernels' of tables, or one JSON object a line"
        )
    return list(enumerate(kernels, 1))


def _lines(path: Path, content: bytes) -> list[tuple[int, Any]]:
    """List the lines of a record, numbered, each parsed or with its fault.

    The list is empty for a malformed document that is no record.
    """
    found: list[tuple[int, Any]] = []
    first = b""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        first = first or line.strip()
        try:
            found.append((number, json.loads(line)))
        except RecursionError:
            found.append((number, ValueError("it is nested too deeply")))
        except ValueError as error:
            found.append((number, error))
    # In a multi-line document at most one line is a complete object.
    num_objects = sum(isinstance(one, dict) for _, one in found)
    is_document = path.suffix == ".json" or first[-1:] in (b"[", b"{", b",", b":")
    return found if num_objects > is_document else []

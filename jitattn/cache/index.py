"""Splits the index of an archive into its kernels before any JSON is parsed.

A JSON text of a few megabytes can become a gigabyte of objects. So the text is first split into its
kernels, without building objects, and each kernel is parsed when it is needed.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from jitattn.cache.entry import MAX_JSON_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A string, the quote of an unterminated one, or a bracket.
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)
_LIST_DEPTH: Final = 2  # inside the outer object and the list of kernels
_MAX_DEPTH: Final = 8
_MAX_REST_BYTES: Final = 1024 * 1024
_PLACE: Final = b"0"  # stands for a kernel in the rest of the text


class Index:
    """Index of an archive, split but not yet parsed.

    Parameters
    ----------
    text : bytes
    max_kernels : int

    Raises
    ------
    ValueError
        It is no JSON, or has more kernels than that, or one that is too large.
    """

    def __init__(self, text: bytes, max_kernels: int) -> None:
        self._text = text
        self._spans = list(_spans(text, max_kernels))
        rest, end = [], 0
        for start, next_end in self._spans:
            rest.append(text[end:start])
            end = next_end
        rest.append(text[end:])
        outer = _PLACE.join(rest)
        if len(outer) > _MAX_REST_BYTES:
            raise ValueError(f"its index has more than {_MAX_REST_BYTES} bytes beside the kernels")
        facts = json.loads(outer.decode())
        #: The outer object, with a 0 for each kernel; empty if the text is no object.
        self.facts: dict[str, Any] = facts if isinstance(facts, dict) else {}

    def __len__(self) -> int:
        return len(self._spans)

    def kernels(self) -> Iterator[object]:
        """Parse and yield the kernels one by one, as new objects each time.

        Raises
        ------
        ValueError
            One is no JSON.
        """
        for start, end in self._spans:
            yield json.loads(self._text[start:end].decode())


def _spans(text: bytes, max_kernels: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each kernel: an object or list in a list of the outer object."""
    depth = start = count = inside = 0
    for token in _TOKEN.finditer(text):
        mark, end = token[0], token.end()
        if mark in (b"{", b"["):
            if depth == _LIST_DEPTH:
                start, count = token.start(), count + 1
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
            if depth == _LIST_DEPTH:
                inside += end - start
                yield start, end
        elif mark == b'"':
            raise ValueError("its index is damaged: a text that does not end")
        if not 0 <= depth <= _MAX_DEPTH or count > max_kernels:
            raise ValueError("its index is damaged, or its members do not match")
        if depth > _LIST_DEPTH and end - start > MAX_JSON_BYTES:
            raise ValueError(f"its index has a kernel of more than {MAX_JSON_BYTES} bytes")
        if depth <= _LIST_DEPTH and end - inside > _MAX_REST_BYTES:
            raise ValueError(f"its index has more than {_MAX_REST_BYTES} bytes beside the kernels")

"""Finds the rule of positions that a traced mask is, where it bounds the distance to a key."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jitattn.spec.program import INTEGERS
from jitattn.values.masks import Causal, Window

if TYPE_CHECKING:
    from jitattn.request.mask_blocks import Sizes
    from jitattn.spec.program import Program
    from jitattn.values.functions import Function


class _Linear(NamedTuple):
    """a row + b key + c shift + offset."""

    row: int
    key: int
    shift: int
    offset: int


def rule_by_distance(program: Program, function: Function, sizes: Sizes) -> Causal | Window | None:
    """Return the rule of a mask that bounds row - key, or row + Lkv - Lq - key."""
    bounds = _bounds(program, function, program.mask or 0)
    if bounds is None:
        return None
    shift, least, most = bounds
    is_square = sizes.is_uniform and sizes.len_q == sizes.len_kv
    if shift == 0 and least == 0 and most is None:
        return Causal("top_left")
    if not (shift == 1 or is_square):
        return None
    if least == 0 and most is None:
        return Causal()
    if (least is not None and least > 0) or (most is not None and most < 0):
        return None
    return Window(most, None if least is None else -least)


def _bounds(
    program: Program, function: Function, idx: int
) -> tuple[int, int | None, int | None] | None:
    """Return the factor of Lkv - Lq and the bounds of the distance that a node stands for."""
    node = program.nodes[idx]
    if node.op == "and":
        sides = [_bounds(program, function, arg) for arg in node.args]
        one, other = sides
        if one is None or other is None or one[0] != other[0]:
            return None
        least = [x for x in (one[1], other[1]) if x is not None]
        most = [x for x in (one[2], other[2]) if x is not None]
        return one[0], max(least, default=None), min(most, default=None)
    if node.op not in ("lt", "le", "gt", "ge"):
        return None
    left, right = (_linear(program, function, arg) for arg in node.args)
    if left is None or right is None:
        return None
    row, key, shift, offset = (a - b for a, b in zip(left, right, strict=True))
    if row == -1:  # turned round
        row, key, shift, offset = -row, -key, -shift, -offset
        op = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}[node.op]
    else:
        op = node.op
    if (row, key) != (1, -1) or shift not in (0, 1):
        return None
    # distance + offset op 0
    if op in ("ge", "gt"):
        return shift, -offset + (op == "gt"), None
    return shift, None, -offset - (op == "lt")


def _linear(program: Program, function: Function, idx: int) -> _Linear | None:
    node = program.nodes[idx]
    if node.op in ("row", "key", "shift"):
        return _Linear(node.op == "row", node.op == "key", node.op == "shift", 0)
    if node.op == "number" and node.kind in INTEGERS:
        value = int(function.numbers[node.args[0]])
        return _Linear(0, 0, 0, value) if abs(value) < 2**30 else None
    if node.op in ("add", "sub", "neg", "cast") and node.kind in ("i32", "i64"):
        found = [_linear(program, function, arg) for arg in node.args]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            return None
        if len(parts) == 1:
            one = parts[0]
            return one if node.op == "cast" else _Linear(*(-x for x in one))
        sign = 1 if node.op == "add" else -1
        return _Linear(*(a + sign * b for a, b in zip(*parts, strict=True)))
    return None

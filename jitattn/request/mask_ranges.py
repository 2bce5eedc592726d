"""Finds the blocks in which a traced mask may be true, by intervals of what it computes.

Each node of its program is an interval over a block of queries and keys, computed for all blocks at
once with torch, on the device of the captured tensors: O(blocks) memory, and no pair is looked at.
Intervals may be too wide, so a block may count in vain, but none is missed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jitattn.spec.program import FLOATS, INTEGERS, Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.values.functions import Function

#: Queries and keys of a block.
BLOCK: Final = 64
_INT_MOST: Final = 2**31 - 1


class Sizes(NamedTuple):
    """Sequences, query heads and the largest lengths of a call."""

    batch: int
    heads: int
    len_q: int
    len_kv: int
    is_uniform: bool  #: all sequences have these lengths


class _Range(NamedTuple):
    """Bounds of a value over each block, broadcastable to [B, H, blocks of q, blocks of k]."""

    low: Tensor
    high: Tensor
    axis: str = ""  #: "row" or "key": the indices of the blocks themselves

    @property
    def is_point(self) -> bool:
        """Whether bounds are known to be equal: the same tensor."""
        return self.low is self.high


def visible_blocks(program: Program, function: Function, sizes: Sizes) -> Tensor | None:
    """Return which blocks may have visible pairs, [rows, columns] or [heads, rows, columns].

    A block counts if it does in any sequence. None: nothing is known of any.
    """
    where = function.tensors[0].device if function.tensors else torch.device("cpu")
    evaluation = _Evaluation(program, function, sizes, where)
    _, may_see, _ = evaluation.value(program.mask or 0)
    shape = (sizes.batch, sizes.heads, -(-sizes.len_q // BLOCK), -(-sizes.len_kv // BLOCK))
    dims = (1,) * (4 - may_see.dim()) + tuple(may_see.shape)
    if dims[2:] == (1, 1):
        return None
    by_head = may_see.reshape(dims).any(0)
    return by_head.expand(by_head.shape[0], *shape[2:])[0 if by_head.shape[0] == 1 else slice(None)]


class _Evaluation:
    """Computes the ranges of nodes, each once."""

    def __init__(
        self, program: Program, function: Function, sizes: Sizes, where: torch.device
    ) -> None:
        self.program, self.function, self.sizes, self.where = program, function, sizes, where
        self._known: dict[int, _Range] = {}

    def value(self, idx: int) -> _Range:
        found = self._known.get(idx)
        if found is None:
            found = self._known[idx] = self._computed(idx)
        return found

    def _computed(self, idx: int) -> _Range:
        op, kind, args = self.program.nodes[idx]
        if op in ("row", "key"):
            length = self.sizes.len_q if op == "row" else self.sizes.len_kv
            low = torch.arange(0, length, BLOCK, device=self.where)
            high = (low + BLOCK - 1).clamp(max=length - 1)
            view = (-1, 1) if op == "row" else (-1,)
            return _Range(low.view(view), high.view(view), op)
        if op in ("batch", "head"):
            count = self.sizes.batch if op == "batch" else self.sizes.heads
            dims = 3 if op == "batch" else 2
            return _point(torch.arange(count, device=self.where).view(-1, *(1,) * dims))
        if op == "shift":
            if not self.sizes.is_uniform:
                return self._unknown(kind)
            return self._number(self.sizes.len_kv - self.sizes.len_q)
        if op == "number":
            return self._number(self.function.numbers[args[0]])
        if op == "const":
            return self._number(bool(args[0])) if kind == "b1" else self._unknown(kind)
        if op == "read":
            return self._read(args, kind)
        rule = _RANGES.get(op)
        if rule is None:
            return self._unknown(kind)
        operands = [self.value(arg) for arg in args]
        found = rule(*operands)
        if found is None:
            return self._unknown(kind)
        if kind in FLOATS:
            return _without_nan(found)
        if op == "cast" and operands[0].axis and kind in ("i32", "i64"):
            return operands[0]
        if kind in INTEGERS and kind != "i64":  # what may wrap is not known
            wraps = (found.low < -_INT_MOST) | (found.high > _INT_MOST)
            least = {"i32": -_INT_MOST - 1, "i16": -(2**15), "i8": -128, "u8": 0}[kind]
            most = {"i32": _INT_MOST, "i16": 2**15 - 1, "i8": 127, "u8": 255}[kind]
            wraps = wraps | (found.low < least) | (found.high > most)
            low, high = torch.where(wraps, least, found.low), torch.where(wraps, most, found.high)
            return _point(low) if found.is_point else _Range(low, high)
        return found

    def _number(self, value: float) -> _Range:
        dtype = {bool: torch.bool, int: torch.int64}.get(type(value), torch.float32)
        return _point(torch.tensor(value, dtype=dtype, device=self.where))

    def _unknown(self, kind: str) -> _Range:
        if kind == "b1":
            return _Range(self._number(False).low, self._number(True).low)
        most = 2**62 if kind in INTEGERS else float("inf")
        return _Range(self._number(-most).low, self._number(most).low)

    def _read(self, args: tuple[int, ...], kind: str) -> _Range:
        """Return the range of a tensor over the ranges of its indices.

        Along one dimension indexed by rows or keys themselves, of each block; along other
        dimensions whose index is not known, of all elements.
        """
        tensor = self.function.tensors[args[0]]
        if kind == "f16" or kind == "bf16" or tensor.dtype is torch.float64:
            tensor = tensor.float()
        if kind == "b1":
            tensor = tensor.to(torch.uint8)
        elif kind in INTEGERS:  # sums must not wrap here
            tensor = tensor.to(torch.int64)
        low = high = tensor
        index: list[Any] = []
        is_point = True
        for axis, arg in enumerate(args[1:]):
            own = self.value(arg)
            size = tensor.shape[axis]
            if own.is_point:
                wrapped = torch.where(own.low < 0, own.low + size, own.low)
                index.append(wrapped.long().clamp(0, size - 1))
                continue
            is_point = False
            if own.axis:
                length = self.sizes.len_q if own.axis == "row" else self.sizes.len_kv
                low, high = (
                    _pooled(x, axis, length, reduce)
                    for x, reduce in ((low, torch.amin), (high, torch.amax))
                )
                blocks = torch.arange(low.shape[axis], device=self.where)
                index.append(blocks.view((-1, 1) if own.axis == "row" else (-1,)))
            else:
                low, high = low.amin(axis, keepdim=True), high.amax(axis, keepdim=True)
                index.append(torch.zeros((), dtype=torch.int64, device=self.where))
        if not index:
            return _point(tensor.bool() if kind == "b1" else tensor)
        low = low[tuple(index)]
        high = low if is_point else high[tuple(index)]
        if kind == "b1":
            low, high = low.bool(), high.bool() if high is not low else low
            return _Range(low, low if is_point else high)
        return _without_nan(_Range(low, high))


def _without_nan(x: _Range) -> _Range:
    """Return a range of floats in which NaN, of which nothing is known, is every number."""
    if x.is_point or not x.low.is_floating_point():
        return x
    most = float("inf")
    low = torch.where(x.low.isnan(), -most, x.low)
    return _Range(low, torch.where(x.high.isnan(), most, x.high))


def _pooled(x: Tensor, axis: int, length: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce each block of indices 0 … length - 1 of a dimension; later ones are its last."""
    blocks = -(-length // BLOCK)
    places = torch.arange(blocks * BLOCK, device=x.device).clamp(max=min(length, x.shape[axis]) - 1)
    return reduce(x.index_select(axis, places).unflatten(axis, (blocks, BLOCK)), axis + 1)


def _point(value: Tensor) -> _Range:
    return _Range(value, value)


def _binary(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[_Range, _Range], _Range]:
    """Return the range of an operation that grows with both operands."""

    def rule(x: _Range, y: _Range) -> _Range:
        low = combine(x.low, y.low)
        return _point(low) if x.is_point and y.is_point else _Range(low, combine(x.high, y.high))

    return rule


def _sub(x: _Range, y: _Range) -> _Range:
    return _binary(torch.add)(x, _neg(y))


def _neg(x: _Range) -> _Range:
    return _point(-x.low) if x.is_point else _Range(-x.high, -x.low)


def _mul(x: _Range, y: _Range) -> _Range | None:
    if x.is_point and y.is_point:
        return _point(x.low * y.low)
    if x.low.is_floating_point() or y.low.is_floating_point():
        return None
    limit = 2**31  # beyond, products may pass 64 bits
    parts = [a.clamp(-limit, limit) * b.clamp(-limit, limit) for a in x[:2] for b in y[:2]]
    low = functools.reduce(torch.minimum, parts)
    return _Range(low, functools.reduce(torch.maximum, parts))


def _abs(x: _Range) -> _Range:
    if x.is_point:
        return _point(x.low.abs())
    high = torch.maximum(x.low.abs(), x.high.abs())
    return _Range(
        torch.where((x.low <= 0) & (x.high >= 0), 0, torch.minimum(x.low.abs(), x.high.abs())), high
    )


def _quotient(rounding: str) -> Callable[[_Range, _Range], _Range | None]:
    """Return the range of a division by a number other than 0."""

    def rule(x: _Range, y: _Range) -> _Range | None:
        if not (y.is_point and y.low.numel() == 1) or y.low.is_floating_point():
            return None
        by = torch.where(y.low == 0, 1, y.low)
        one, other = (torch.div(a, by, rounding_mode=rounding) for a in (x.low, x.high))
        if x.is_point:
            return _point(one)
        return _Range(torch.minimum(one, other), torch.maximum(one, other))

    return rule


def _mod(x: _Range, y: _Range) -> _Range | None:
    if not (y.is_point and y.low.numel() == 1) or y.low.is_floating_point():
        return None
    by = torch.where(y.low == 0, 1, y.low)
    if x.is_point:
        return _point(torch.remainder(x.low, by))
    turns = (torch.div(a, by, rounding_mode="floor") for a in (x.low, x.high))
    stays = torch.eq(*turns)
    least, most = torch.where(by > 0, 0, by + 1), torch.where(by > 0, by - 1, 0)
    return _Range(
        torch.where(stays, torch.remainder(x.low, by), least),
        torch.where(stays, torch.remainder(x.high, by), most),
    )


def _fmod(x: _Range, y: _Range) -> _Range | None:
    if not (y.is_point and y.low.numel() == 1) or y.low.is_floating_point():
        return None
    by = torch.where(y.low == 0, 1, y.low).abs()
    if x.is_point:
        return _point(torch.fmod(x.low, by))
    most = by - 1
    return _Range(torch.where(x.low >= 0, 0, -most), torch.where(x.high <= 0, 0, most))


def _compared(is_true: Callable[[Tensor, Tensor], Tensor], *, grows: bool) -> Callable[..., _Range]:
    """Return the range of a comparison; `grows`: it is likelier for a larger first operand."""

    def rule(x: _Range, y: _Range) -> _Range:
        if x.is_point and y.is_point:
            return _point(is_true(x.low, y.low))
        surely = is_true(x.low, y.high) if grows else is_true(x.high, y.low)
        possibly = is_true(x.high, y.low) if grows else is_true(x.low, y.high)
        return _Range(surely, possibly)

    return rule


def _equal(x: _Range, y: _Range) -> _Range:
    if x.is_point and y.is_point:
        return _point(x.low == y.low)
    overlap = (x.low <= y.high) & (y.low <= x.high)
    return _Range((x.low == x.high) & (y.low == y.high) & (x.low == y.low), overlap)


def _not(x: _Range) -> _Range | None:
    if x.low.dtype is not torch.bool:
        return None
    return _point(~x.low) if x.is_point else _Range(~x.high, ~x.low)


def _logic(
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[_Range, _Range], _Range | None]:
    def rule(x: _Range, y: _Range) -> _Range | None:
        if x.low.dtype is not torch.bool:
            return None
        return _binary(combine)(x, y)

    return rule


def _where(condition: _Range, x: _Range, y: _Range) -> _Range:
    if x.low.dtype is torch.bool:
        low = (condition.low & x.low) | (~condition.high & y.low) | (x.low & y.low)
        return _Range(low, (condition.high & x.high) | (~condition.low & y.high))
    low = torch.where(
        condition.low, x.low, torch.where(condition.high, torch.minimum(x.low, y.low), y.low)
    )
    high = torch.where(
        condition.low, x.high, torch.where(condition.high, torch.maximum(x.high, y.high), y.high)
    )
    return _Range(low, high)


def _cast(x: _Range) -> _Range | None:
    return None if x.low.is_floating_point() or x.low.dtype is torch.bool else x


_RANGES: Final[dict[str, Callable[..., _Range | None]]] = {
    "add": _binary(torch.add), "sub": _sub, "neg": _neg, "mul": _mul, "abs": _abs,
    "min": _binary(torch.minimum), "max": _binary(torch.maximum),
    "floordiv": _quotient("floor"), "truncdiv": _quotient("trunc"), "mod": _mod, "fmod": _fmod,
    "lt": _compared(torch.lt, grows=False), "le": _compared(torch.le, grows=False),
    "gt": _compared(torch.gt, grows=True), "ge": _compared(torch.ge, grows=True),
    "eq": _equal, "ne": lambda x, y: _not(_equal(x, y)), "not": _not,
    "and": _logic(torch.logical_and), "or": _logic(torch.logical_or),
    "where": _where, "cast": _cast,
}  # fmt: skip

"""Evaluates traced functions on chunks of scores with torch's operations, which are differentiable.

What a kernel computes in fp32 is computed in the dtype of the scores here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jitattn.spec.program import parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.spec.program import Node, Program
    from jitattn.values.functions import Function

_DTYPES: Final = {
    "b1": torch.bool, "u8": torch.uint8, "i8": torch.int8, "i16": torch.int16, "i32": torch.int32,
    "i64": torch.int64, "f16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


class Chunk(NamedTuple):
    """Where scores [B, Hq, rows, keys] are from."""

    first_row: int
    first_key: int
    shift: int  #: Lkv - Lq


def evaluate(
    function: Function, scores: Tensor, chunk: Chunk
) -> tuple[Tensor | None, Tensor | None]:
    """Return the new scores of a chunk, and which pairs are visible; None where unchanged."""
    return evaluate_program(parse(function.program), function, scores, chunk)


def evaluate_program(
    program: Program, function: Function, scores: Tensor, chunk: Chunk
) -> tuple[Tensor | None, Tensor | None]:
    """Return what a program makes of a chunk, with a function's numbers and tensors."""
    wide = scores.dtype
    batch, heads, rows, keys = scores.shape
    device = scores.device

    def indices(first: int, count: int, dims: int) -> Tensor:
        found = torch.arange(first, first + count, dtype=torch.int32, device=device)
        return found.view(-1, *(1,) * dims)

    leaves = {
        "score": scores,
        "batch": indices(function.first_batch, batch, 3),
        "head": indices(0, heads, 2),
        "row": indices(chunk.first_row, rows, 1),
        "key": indices(chunk.first_key, keys, 0),
        "shift": torch.tensor(chunk.shift, dtype=torch.int32, device=device),
    }
    values: list[Any] = []
    for node in program.nodes:
        if node.op in leaves:
            values.append(leaves[node.op])
            continue
        found = _value(node, function, values, wide)
        values.append(found.to(_DTYPES.get(node.kind, wide)))
    shape = scores.shape
    changed = None if program.score is None else values[program.score].expand(shape)
    visible = None if program.mask is None else values[program.mask].expand(shape)
    return changed, visible


def _value(node: Node, function: Function, values: list[Any], wide: torch.dtype) -> Tensor:
    op, kind, args = node
    dtype = _DTYPES.get(kind, wide)
    if op == "number":
        return torch.tensor(function.numbers[args[0]], dtype=dtype, device="cpu")
    if op == "const" and kind == "f32":  # of derivatives
        bits = torch.tensor(args[0], dtype=torch.int64, device="cpu")
        return bits.to(torch.int32).view(torch.float32).to(wide)
    if op == "const":
        return torch.tensor(bool(args[0]), dtype=torch.bool, device="cpu")
    if op == "read":
        tensor, *index = args
        return _read(function.tensors[tensor], [values[one] for one in index])
    operands = [values[one] for one in args]
    if op == "cast":
        converted: Tensor = operands[0].to(dtype)
        return converted
    if kind in ("f16", "bf16"):  # computed in fp32 and rounded once, as kernels do
        operands = [x.to(torch.float32) if x.is_floating_point() else x for x in operands]
    found: Tensor = _OPERATIONS[op](*operands)
    return found


def _read(tensor: Tensor, index: list[Tensor]) -> Tensor:
    """Read a tensor at indices, of which those beyond its ends are bounded."""
    if not index:
        return tensor
    places = []
    for one, size in zip(index, tensor.shape, strict=True):
        wrapped = torch.where(one < 0, one + size, one).long()
        places.append(wrapped.clamp(0, max(0, size - 1)))
    if tensor.numel() == 0:
        return tensor.new_zeros(())
    return tensor[tuple(places)]


def _safe(divide: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a division of integers that does not raise where the divisor is 0."""

    def divided(one: Tensor, other: Tensor) -> Tensor:
        if not other.is_floating_point():
            other = torch.where(other == 0, 1, other)
        return divide(one, other)

    return divided


def _shifted(shift: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def shifted(one: Tensor, other: Tensor) -> Tensor:
        bits = one.element_size() * 8
        if shift is torch.bitwise_left_shift:
            inside = (other >= 0) & (other < bits)
            return torch.where(inside, shift(one, other.clamp(0, bits - 1)), 0)
        return shift(one, torch.where((other < 0) | (other >= bits), bits - 1, other))

    return shifted


def _power(one: Tensor, other: Tensor) -> Tensor:
    if not one.is_floating_point():
        inverse = torch.where(one.abs() == 1, torch.where(other % 2 == 0, one * one, one), 0)
        return torch.where(other < 0, inverse, torch.pow(one, other.clamp(min=0)))
    return torch.pow(one, other)


_OPERATIONS: Final[dict[str, Callable[..., Tensor]]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
    "floordiv": _safe(lambda x, y: torch.div(x, y, rounding_mode="floor")),
    "truncdiv": _safe(lambda x, y: torch.div(x, y, rounding_mode="trunc")),
    "mod": _safe(torch.remainder), "fmod": _safe(torch.fmod), "pow": _power,
    "min": torch.minimum, "max": torch.maximum, "atan2": torch.atan2,
    "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    "not": torch.bitwise_not, "shl": _shifted(torch.bitwise_left_shift),
    "shr": _shifted(torch.bitwise_right_shift),
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
    "where": torch.where, "detach": lambda x: x.detach(),
    **{name: getattr(torch, name) for name in (
        "neg", "abs", "sign", "floor", "ceil", "round", "trunc", "exp", "exp2", "expm1", "log",
        "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "sin", "cos", "tan",
        "sinh", "cosh", "atan", "erf", "isnan", "isinf",
    )},
}  # fmt: skip

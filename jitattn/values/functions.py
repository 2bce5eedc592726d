"""Turns score and mask functions into what kernels take: a program, its numbers and its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from jitattn.errors import InvalidInputError
from jitattn.spec.program import MOST_NODES, MOST_NUMBERS, MOST_TENSORS
from jitattn.values.symbols import Symbol, Tape, refusal
from jitattn.values.traced_operations import added, converted
from jitattn.values.tracing import Tracing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import MaskMod


class Function(NamedTuple):
    """A traced function of the pairs of a call."""

    program: str
    numbers: tuple[float, ...]
    tensors: tuple[Tensor, ...]
    first_batch: int = 0  #: the CPU path's: number of the first sequence that it is called for


class MovedScore(NamedTuple):
    """A score function whose q_idx counts from an offset."""

    function: Callable[..., Any]
    q_offset: QOffset


def traced(score_mod: Callable[..., Any] | MovedScore | None, mask: MaskMod | None) -> Function:
    """Trace a score function and a mask function, which then share numbers and tensors.

    Raises
    ------
    InvalidInputError
        `score_mod` is no function, or one returns neither a symbol nor a number.
    UnsupportedError
        Something in one cannot be traced; the message shows the line.
    """
    is_moved = isinstance(score_mod, MovedScore)
    if score_mod is not None and not (is_moved or callable(score_mod)):
        raise InvalidInputError(
            f"score_mod={score_mod!r}: it must be a function of (score, b, h, q_idx, kv_idx)"
        )
    tape = Tape()
    with Tracing():
        score = None if score_mod is None else _traced_score(tape, score_mod)
        visible = None if mask is None else _traced_mask(tape, mask)
    sizes = (len(tape.nodes), len(tape.numbers), len(tape.tensors))
    most = (MOST_NODES, MOST_NUMBERS, MOST_TENSORS)
    if any(size > limit for size, limit in zip(sizes, most, strict=True)):
        raise refusal(
            f"the function has {sizes[0]} operations, {sizes[1]} numbers and {sizes[2]} captured "
            f"tensors: at most {most[0]}, {most[1]} and {most[2]} serve"
        )
    captured = tape.captured(score, visible)
    return Function(captured.program, captured.numbers, captured.tensors)


def _traced_score(tape: Tape, score_mod: Callable[..., Any] | MovedScore) -> Symbol:
    function, offset = score_mod if isinstance(score_mod, MovedScore) else (score_mod, 0)
    score = tape.add("score", "f32")
    batch, head, row, key = (tape.add(name, "i32") for name in ("batch", "head", "row", "key"))
    found = function(score, batch, head, _moved(tape, batch, row, offset), key)
    return converted(tape, _result(found, "score_mod"), "f32")


def _traced_mask(tape: Tape, mask: MaskMod) -> Symbol:
    kind, parts = mask.parts
    if kind:
        found = [_traced_mask(tape, part) for part in parts]
        return tape.add(kind, "b1", *(one.idx for one in found))
    batch, head, row, key = (tape.add(name, "i32") for name in ("batch", "head", "row", "key"))
    row = _moved(tape, batch, row, mask.q_offset)
    return converted(tape, _result(mask.function(batch, head, row, key), "MaskMod"), "b1")


def _moved(tape: Tape, batch: Symbol, row: Symbol, offset: Any) -> Symbol:  # noqa: ANN401
    """Return the index of a row from an offset on."""
    if isinstance(offset, str):
        return added(row, tape.add("shift", "i32"))
    if type(offset) is not int:
        return added(row, offset[batch])
    return added(row, offset) if offset != 0 else row


def _result(found: Any, name: str) -> Any:  # noqa: ANN401 - a symbol, or a number
    if isinstance(found, Symbol) or type(found) in (int, float, bool):
        return found
    raise InvalidInputError(
        f"{name}: the function returned a {type(found).__name__}: it must return what it computes "
        "of its arguments"
    )

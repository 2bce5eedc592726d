"""Encodes a call of `attention` as tensors, integers and floats for operators, and decodes it."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

import torch

from jitattn.request.problem import Call, axes, is_deterministic
from jitattn.request.scores import ADDED, NO_CHANGES, NUMBERS, Scores
from jitattn.spec.program import parse
from jitattn.values.dropout import Dropout
from jitattn.values.functions import Function
from jitattn.values.masks import (
    BY_VALUE,
    Both,
    Dense,
    Full,
    FunctionBlocks,
    KeyPadding,
    Rule,
    parts_of,
)
from jitattn.values.norm import L2Norm
from jitattn.values.sequences import Padded, Paged, Ragged

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from jitattn.values.masks import Mask

_NONE: Final = -(2**40)  #: stands for an integer that is None
_CHARACTERS: Final = 7  #: of a text, in an integer of 64 bits
LAYOUTS: Final = ("bshd", "bhsd")
DTYPES: Final = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: How a field of a rule is written, by its type.
_FORMS: Final = {
    "int": "integer",
    "int | None": "integer",
    "bool": "bool",
    "Align": "align",
    "Tensor": "tensor",
    "int | tuple[int, int]": "pair",
    "tuple[HeadRule, ...]": "rules",
}
#: Rules by their numbers, and the names and forms of their fields.
_RULES: Final[dict[int, Any]] = {
    kind.graph_number: kind for kind in get_args(Rule) if kind is not FunctionBlocks
}
_FIELDS: Final = {
    number: tuple((field.name, _FORMS[str(field.type)]) for field in fields(kind))
    for number, kind in _RULES.items()
}


class Encoded(NamedTuple):
    """The encoded arguments of a call beside q, k and v."""

    tensors: list[Tensor]
    ints: list[int]
    floats: list[float]


class _Kept(NamedTuple):
    """A call in an autograd context, without its tensors."""

    ints: list[int]
    floats: list[float]
    rules: list[Rule | None]
    programs: list[str]


def without_tensors(call: Call) -> tuple[Call | _Kept, Sequence[Tensor]]:
    """Separate a call for an autograd context from its tensors, which autograd saves.

    The backward pass reads the tensors of masks, sequences, scores and dropout again: saved by
    autograd, they are checked for writes, and saved-tensor hooks can move them.
    """
    if (
        type(call.mask) in BY_VALUE
        and call.q_seqs is call.kv_seqs is None
        and call.out is None
        and (call.scores is NO_CHANGES or call.scores == NO_CHANGES)
    ):
        return call, ()
    writer = _KeepingWriter()
    encoder(call, writer)
    return _Kept(writer.ints, writer.floats, writer.rules, writer.programs), writer.tensors


def with_tensors(kept: Call | _Kept, tensors: Sequence[Tensor]) -> Call:
    """Rebuild a call from what `without_tensors` returned."""
    if isinstance(kept, Call):
        return kept
    reader = _KeepingReader(list(tensors), kept.ints, kept.floats)
    reader.rules, reader.programs = iter(kept.rules), kept.programs
    return read_call(reader)


class Writer:
    """Serializes the fields of a call, in the order in which `Reader` reads them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.ints: list[int] = []
        self.floats: list[float] = [0.0]  # autograd mistakes an empty list for tensors

    def encoded(self) -> Encoded:
        """Return the encoded fields."""
        return Encoded(self.tensors, self.ints, self.floats)

    def tensor(self, value: Tensor | None) -> None:
        """Write a tensor, or None."""
        if value is None:
            self.ints.append(_NONE)
        else:
            self.ints.append(len(self.tensors))
            self.tensors.append(value)

    def integer(self, value: int | None) -> None:
        """Write an integer or a bool, or None."""
        self.ints.append(_NONE if value is None else int(value))

    def number(self, value: float | None) -> None:
        """Write a number, or None."""
        self.ints.append(0 if value is None else 1)
        if value is not None:
            self.floats.append(float(value))

    def rule(self, rule: Rule) -> None:
        """Write a positional mask or a pattern: its number, then its fields in order."""
        if isinstance(rule, FunctionBlocks):
            rule = Full()  # its function, which comes with it, says all that it does
        self.integer(rule.graph_number)
        for name, form in _FIELDS[rule.graph_number]:
            value = getattr(rule, name)
            if form == "tensor":
                self.tensor(value)
            elif form == "pair":
                is_pair = isinstance(value, tuple)
                self.integer(value[0] if is_pair else value)
                self.integer(value[1] if is_pair else None)
            elif form == "align":
                self.integer(value == "bottom_right")
            elif form == "rules":
                self.integer(len(value))
                for part in value:
                    self.rule(part)
            else:
                self.integer(value)

    def function(self, function: Function | None) -> None:
        """Write a traced function, or None."""
        if function is None:
            self.integer(None)
            return
        self.program(function.program)
        for kind, value in zip(parse(function.program).numbers, function.numbers, strict=True):
            if kind == "f32":
                self.number(value)
            else:
                self.ints.append(int(value))
        for tensor in function.tensors:
            self.tensor(tensor)

    def program(self, text: str) -> None:
        """Write the text of a program, seven characters an integer."""
        packed = [text[i : i + _CHARACTERS] for i in range(0, len(text), _CHARACTERS)]
        self.ints.append(len(packed))
        self.ints += (int.from_bytes(part.encode("ascii"), "big") for part in packed)

    def sequences(self, seqs: Any) -> None:  # noqa: ANN401 - one of three, or None
        """Write a sequences value, or None."""
        if seqs is None:
            self.integer(0)
            return
        self.integer(1 if isinstance(seqs, Ragged) else 2 if isinstance(seqs, Padded) else 3)
        self.tensor(seqs.cumulative)
        if seqs.cumulative is None:
            self.tensor(seqs.start)
            self.tensor(seqs.stop)
        self.integer(seqs.stop_is_length)
        self.integer(seqs._max_length)
        self.integer(seqs._overlaps)
        if isinstance(seqs, Padded):
            self.tensor(seqs.batch_idx)
        elif isinstance(seqs, Paged):
            self.tensor(seqs.block_table)


class Reader:
    """Deserializes the fields of a call."""

    def __init__(self, tensors: list[Tensor], ints: list[int], floats: list[float]) -> None:
        self._tensors, self._ints, self._floats = tensors, iter(ints), iter(floats[1:])

    def integer(self) -> Any:  # noqa: ANN401 - int or None
        """Read an integer, or None."""
        value = next(self._ints)
        return None if value == _NONE else value

    def tensor(self) -> Any:  # noqa: ANN401 - Tensor or None
        """Read a tensor, or None."""
        value = self.integer()
        return None if value is None else self._tensors[value]

    def number(self) -> float | None:
        """Read a number, or None."""
        return next(self._floats) if self.integer() else None

    def rule(self) -> Any:  # noqa: ANN401 - a rule
        """Read a positional mask or a pattern."""
        number = self.integer()
        return _RULES[number](*[self._field(form) for _, form in _FIELDS[number]])

    def _field(self, form: str) -> Any:  # noqa: ANN401 - of the form
        if form == "tensor":
            return self.tensor()
        value = self.integer()
        if form == "pair":
            second = self.integer()
            return value if second is None else (value, second)
        if form == "align":
            return "bottom_right" if value else "top_left"
        if form == "rules":
            return [self.rule() for _ in range(value)]
        return bool(value) if form == "bool" else value

    def function(self) -> Function | None:
        """Read a traced function, or None."""
        text = self.program()
        if text is None:
            return None
        program = parse(text)
        numbers = [
            (self.number() or 0.0) if kind == "f32" else next(self._ints)
            for kind in program.numbers
        ]
        return Function(text, tuple(numbers), tuple(self.tensor() for _ in program.tensors))

    def program(self) -> str | None:
        """Read the text of a program, or None."""
        count = self.integer()
        if count is None:
            return None
        parts = (next(self._ints) for _ in range(count))
        return b"".join(part.to_bytes(_CHARACTERS, "big").lstrip(b"\0") for part in parts).decode(
            "ascii"
        )

    def sequences(self) -> Any:  # noqa: ANN401 - one of three, or None
        """Read a sequences value, or None."""
        kind = self.integer()
        if kind == 0:
            return None
        cumulative, start, stop = self.tensor(), None, None
        if cumulative is None:
            start, stop = self.tensor(), self.tensor()
        is_length, longest, overlaps = bool(self.integer()), self.integer(), self.integer()
        cls: Any = (Ragged, Padded, Paged)[kind - 1]
        made = cls.__new__(cls)
        made._hold(cls.__name__, cumulative, start, stop, is_length, longest)
        if kind > 1:
            object.__setattr__(made, "batch_idx" if kind == 2 else "block_table", self.tensor())
        object.__setattr__(made, "_overlaps", None if overlaps is None else bool(overlaps))
        return made


class _KeepingWriter(Writer):
    """Keeps rules made of numbers as they are, which a context may: it is no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.rules: list[Rule | None] = []  #: None: encoded
        self.programs: list[str] = []

    def program(self, text: str) -> None:
        """Keep the text of a program."""
        self.integer(len(self.programs))
        self.programs.append(text)

    def rule(self, rule: Rule) -> None:
        """Keep a rule, or write it."""
        if type(rule) in BY_VALUE or isinstance(rule, FunctionBlocks):
            self.rules.append(rule)
        else:
            self.rules.append(None)
            super().rule(rule)


class _KeepingReader(Reader):
    """Reads what `_KeepingWriter` wrote and kept."""

    rules: Iterator[Rule | None]
    programs: list[str]

    def program(self) -> str | None:
        """Return the kept text, or None."""
        idx = self.integer()
        return None if idx is None else self.programs[idx]

    def rule(self) -> Any:  # noqa: ANN401 - a rule
        """Return the next rule."""
        kept = next(self.rules)
        return super().rule() if kept is None else kept


def encode(call: Call) -> Encoded:
    """Encode a call as operator arguments; `torch.compile` traces this."""
    return encoder(call).encoded()


def filled(given: Encoded, q: Tensor) -> Encoded:
    """Return the arguments with a tensor in any case, which nobody reads.

    Compiled ahead of time, torch hands None to an operator for an empty list.
    """
    return given if given.tensors else given._replace(tensors=[q.detach()])


def encoder(call: Call, writer: Writer | None = None) -> Writer:
    """Encode a call, and return the writer for further fields."""
    axes(call.layout)  # raises for an unknown layout
    writer = Writer() if writer is None else writer
    # First the fields that result shapes depend on.
    writer.integer(LAYOUTS.index(call.layout))
    writer.integer(DTYPES.index(call.out_dtype))
    parts = parts_of(call.mask)
    writer.rule(parts.rule)
    writer.tensor(None if parts.key_padding is None else parts.key_padding.keep)
    writer.tensor(None if parts.dense is None else parts.dense.keep)
    writer.number(call.scale)
    writer.integer(call.gear)
    writer.integer(call.num_splits)
    writer.integer(call.tile_rows)
    writer.integer(is_deterministic(call))
    writer.sequences(call.q_seqs)
    writer.sequences(call.kv_seqs)
    scores = call.scores
    for name in ADDED:
        writer.tensor(getattr(scores, name))
    for name in NUMBERS:
        writer.number(getattr(scores, name))
    writer.integer(None if scores.dropout is None else scores.dropout.threshold)
    writer.tensor(None if scores.dropout is None else scores.dropout.state)
    norm = scores.qk_norm
    writer.integer(None if norm is None else norm.groups)
    writer.tensor(None if norm is None else norm.head_scale)
    writer.number(None if norm is None else norm.bound)
    writer.integer(None if norm is None else norm.normalize)
    writer.function(scores.function)
    return writer


def decode(tensors: list[Tensor], ints: list[int], floats: list[float]) -> Call:
    """Decode a call, which then requests the LSE."""
    return read_call(Reader(tensors, ints, floats))


def read_call(reader: Reader) -> Call:
    """Decode a call, and leave the fields that follow it."""
    layout, out_dtype = LAYOUTS[reader.integer()], DTYPES[reader.integer()]
    rule, padding, dense = reader.rule(), reader.tensor(), reader.tensor()
    mask: Mask = rule
    if padding is not None or dense is not None:
        mask = Both(
            rule,
            None if padding is None else KeyPadding(padding),
            None if dense is None else Dense(dense),
        )
    scale = reader.number()
    gear, num_splits, tile_rows = reader.integer(), reader.integer(), reader.integer()
    deterministic = bool(reader.integer())
    q_seqs, kv_seqs = reader.sequences(), reader.sequences()
    added: dict[str, Any] = {name: reader.tensor() for name in ADDED}
    for name in NUMBERS:
        added[name] = reader.number()
    threshold, state = reader.integer(), reader.tensor()
    dropout = None if threshold is None else Dropout(threshold, state)
    groups, head_scale, bound = reader.integer(), reader.tensor(), reader.number()
    normalize = reader.integer()
    norm = None if groups is None else L2Norm(groups, head_scale, bound, bool(normalize))
    function = reader.function()
    scores = Scores(**added, dropout=dropout, qk_norm=norm, function=function)
    return Call(
        mask,
        scale,
        layout,
        gear,
        None,
        out_dtype,
        num_splits,
        True,
        q_seqs,
        kv_seqs,
        scores,
        deterministic,
        tile_rows,
    )

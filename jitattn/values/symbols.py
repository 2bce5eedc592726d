"""Symbols: what a score or mask function is called with, and the tape of what it does to them."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jitattn.errors import UnsupportedError
from jitattn.spec.program import BOOL, INTEGERS, MOST_DIMENSIONS, WIDE, Node, Program

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

KIND_OF: Final = {
    torch.bool: BOOL, torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64", torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32",
    torch.float64: "f64",
}  # fmt: skip
DTYPE_OF: Final = {kind: dtype for dtype, kind in KIND_OF.items()}
INT32: Final = range(-(2**31), 2**31)
INT64: Final = range(-(2**63), 2**63)
#: Frames of these folders are none of the user's.
_OURS: Final = tuple(
    str(Path(one).parent) for one in (__file__.rpartition("values")[0] + "x", torch.__file__)
)
#: What is traced: methods and functions of torch's, by name (`traced_operations.py`).
OPERATIONS: Final[dict[str, Callable[..., Any]]] = {}


class Captured(NamedTuple):
    """A traced function: its program, and what the program is given."""

    program: str
    numbers: tuple[float, ...]
    tensors: tuple[torch.Tensor, ...]


class Tape:
    """Collects the nodes, numbers and tensors of a program."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.kinds: list[str] = []
        self.numbers: list[float] = []
        self.tensors: list[torch.Tensor] = []
        self._known: dict[Node, int] = {}

    def add(self, op: str, kind: str, *args: int) -> Symbol:
        """Return the symbol of a node, the same one for equal nodes."""
        node = Node(op, kind, args)
        idx = self._known.get(node)
        if idx is None:
            idx = self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return Symbol(self, idx, kind)

    def number(self, value: float, kind: str) -> Symbol:
        """Return the symbol of a number, an argument of its own even if it equals another."""
        self.kinds.append(kind)
        self.numbers.append(value)
        return self.add("number", kind, len(self.numbers) - 1)

    def tensor(self, value: torch.Tensor) -> int:
        """Return the number of a captured tensor."""
        for idx, known in enumerate(self.tensors):
            if known is value:
                return idx
        if value.dtype not in KIND_OF:
            raise refusal(
                f"a captured tensor is {value.dtype}: it must be of ints, bools or floats"
            )
        if value.dim() > MOST_DIMENSIONS:
            raise refusal(
                f"a captured tensor has {value.dim()} dimensions: at most {MOST_DIMENSIONS} serve"
            )
        self.tensors.append(value)
        return len(self.tensors) - 1

    def captured(self, score: Symbol | None, mask: Symbol | None) -> Captured:
        """Return the traced function."""
        program = Program(
            tuple(self.kinds),
            tuple((KIND_OF[x.dtype], x.dim()) for x in self.tensors),
            tuple(self.nodes),
            None if score is None else score.idx,
            None if mask is None else mask.idx,
        )
        return Captured(program.text(), tuple(self.numbers), tuple(self.tensors))


def refusal(reason: str) -> UnsupportedError:
    """Return the error of something that cannot be traced, with the line of the user's that did."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*_OURS, "<frozen")):
        frame = frame.f_back
    if frame is None:
        return UnsupportedError(reason)
    name, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(name, line).strip()
    return UnsupportedError(f"{name}, line {line}: {text!r}: {reason}")


class _Traced:
    """What torch's functions are not called with: they note what they would have done."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - a symbol, mostly
        """Trace a function of torch's."""
        del types
        return of_torch(func, args, kwargs or {})


class Symbol(_Traced):
    """A value of a program, which behaves as a 0-dimensional tensor."""

    __slots__ = ("idx", "kind", "tape")
    __hash__ = object.__hash__

    def __init__(self, tape: Tape, idx: int, kind: str) -> None:
        self.tape, self.idx, self.kind = tape, idx, kind

    # ---- What a tensor has
    dtype = property(lambda self: DTYPE_OF[self.kind])
    shape = property(lambda self: torch.Size(()))
    ndim = property(lambda self: 0)
    device = property(lambda self: torch.device("cpu"))
    requires_grad = property(lambda self: False)

    def dim(self) -> int:
        """Return 0."""
        return 0

    def numel(self) -> int:
        """Return 1."""
        return 1

    def size(self) -> torch.Size:
        """Return no sizes."""
        return torch.Size(())

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a method of tensors
        handler = OPERATIONS.get(name)
        if handler is None:
            if name.startswith("__"):
                raise AttributeError(name)
            raise refusal(f"a score or mask function cannot use .{name} of a symbol")
        return lambda *args, **kwargs: handled(name, handler, (self, *args), kwargs)

    # ---- What cannot be traced
    def __bool__(self) -> bool:
        raise refusal(
            "the value of a symbol is not known while a function is traced: use torch.where in "
            "place of if, & and | in place of and and or"
        )

    def _no_number(self, *args: object) -> Any:  # noqa: ANN401
        raise refusal("the value of a symbol is not known while a function is traced")

    __int__ = __float__ = __index__ = __complex__ = __len__ = __iter__ = item = tolist = _no_number
    __round__ = _no_number

    def _no_write(self, *args: object) -> Any:  # noqa: ANN401
        raise refusal("a score or mask function must not write to tensors")

    __setitem__ = _no_write

    def __getitem__(self, index: Any) -> Symbol:  # noqa: ANN401
        """Return itself for an index of no dimension."""
        if index in ((), ...):
            return self
        raise refusal("a symbol has no dimension to index")


class View(_Traced):
    """A captured tensor of which some leading dimensions are indexed."""

    __slots__ = ("index", "tape", "tensor")

    def __init__(self, tape: Tape, tensor: torch.Tensor, index: tuple[Symbol | None, ...]) -> None:
        #: A symbol for each dimension that is indexed, None for each that remains.
        self.tape, self.tensor, self.index = tape, tensor, index

    def __getitem__(self, index: Any) -> View | Symbol:  # noqa: ANN401 - of any kind
        """Index the dimensions that remain."""
        given = list(index) if isinstance(index, tuple) else [index]
        places = [place for place, one in enumerate(self.index) if one is None]
        if ... in [one for one in given if one is ...]:
            where = next(place for place, one in enumerate(given) if one is ...)
            rest = len(places) - (len(given) - 1)
            given[where : where + 1] = [slice(None)] * rest
        if len(given) > len(places):
            raise refusal(f"{len(given)} indices for {len(places)} dimensions of a captured tensor")
        found: list[Symbol | None] = list(self.index)
        for place, one in zip(places, given, strict=False):
            if isinstance(one, slice) and one == slice(None):
                continue
            found[place] = _as_index(self.tape, one)
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return View(self.tape, self.tensor, tuple(found))
        return read(self.tape, self.tensor, known)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name.startswith("__"):
            raise AttributeError(name)
        raise refusal(f".{name}: all dimensions of a captured tensor must be indexed first")


def _as_index(tape: Tape, value: Any) -> Symbol:  # noqa: ANN401 - an index of any kind
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        value = read(tape, value, [])
    if isinstance(value, Symbol):
        if value.kind not in INTEGERS:
            raise refusal(f"a captured tensor is indexed by a symbol of {value.dtype}")
        return value if value.kind in ("i32", "i64") else cast(value, "i32")
    if type(value) is int:
        return tape.number(value, "i32" if value in INT32 else "i64")
    raise refusal(
        f"a captured tensor is indexed by a {type(value).__name__}: symbols, ints and : serve"
    )


def read(tape: Tape, tensor: torch.Tensor, index: Sequence[Symbol]) -> Symbol:
    """Return the symbol of a captured tensor's element at indices."""
    kind = KIND_OF.get(tensor.dtype, "")
    number = tape.tensor(tensor)
    return tape.add("read", "f32" if kind in WIDE else kind, number, *(one.idx for one in index))


def cast(value: Symbol, kind: str) -> Symbol:
    """Return a symbol in another kind."""
    return value if value.kind == kind else value.tape.add("cast", kind, value.idx)


def handled(
    name: str, handler: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:  # noqa: ANN401 - a symbol
    """Call an operation's handler; refuse arguments that it does not take."""
    try:
        return handler(*args, **kwargs)
    except (TypeError, AttributeError, StopIteration) as error:
        raise refusal(f"{name} is not traced with these arguments ({error})") from error


def has_symbol(values: Any) -> bool:  # noqa: ANN401 - any nesting
    """Return whether a symbol is among values, nested or not."""
    if isinstance(values, Symbol | View):
        return True
    if isinstance(values, dict):
        return any(has_symbol(one) for one in values.values())
    return isinstance(values, tuple | list) and any(has_symbol(one) for one in values)


def of_torch(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Trace a function of torch's that was called with a symbol."""
    name = getattr(func, "__name__", str(func))
    if name == "__getitem__" and isinstance(args[0], torch.Tensor):
        tape = _tape_of(args[1])
        return View(tape, args[0], (None,) * args[0].dim())[args[1]]
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        raise refusal("a score or mask function must not write to tensors")
    plain = name.strip("_")
    if name.startswith("__") and plain[:1] == "r" and plain[1:] in OPERATIONS:
        return handled(name, swapped(OPERATIONS[plain[1:]]), args, kwargs)
    handler = OPERATIONS.get(plain)
    if handler is None:
        raise refusal(f"torch's {name} of a symbol is not traced")
    return handled(name, handler, args, kwargs)


def _tape_of(index: Any) -> Tape:  # noqa: ANN401
    one: Tape = next(
        part.tape
        for part in (index if isinstance(index, tuple) else (index,))
        if isinstance(part, Symbol)
    )
    return one


def swapped(handler: Callable[..., Symbol]) -> Callable[..., Symbol]:
    """Return an operation with its operands exchanged."""
    return lambda one, other: handler(other, one)

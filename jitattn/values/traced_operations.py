"""Operations on symbols: the kinds in which they are combined, and torch's and Python's names.

Kinds are those that torch gives 0-dimensional tensors: a Python number takes the kind of the tensor
beside it, an int beyond int32 is int64, and a float makes floats of integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.spec.program import BOOL, FLOATS, INTEGERS, WIDE
from jitattn.values.symbols import (
    INT32,
    INT64,
    KIND_OF,
    OPERATIONS,
    Symbol,
    Tape,
    View,
    cast,
    handled,
    read,
    refusal,
    swapped,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def _promoted(values: Sequence[Any]) -> str:
    """Return the kind in which symbols and numbers are combined, as torch promotes."""
    symbols = [value for value in values if isinstance(value, Symbol)]
    dtype = symbols[0].dtype
    for one in symbols[1:]:
        dtype = torch.promote_types(dtype, one.dtype)
    kind = KIND_OF[dtype]
    for value in values:
        if isinstance(value, Symbol):
            continue
        if isinstance(value, float):
            kind = kind if kind in FLOATS else "f32"
        elif type(value) is int and kind not in FLOATS:
            if kind == BOOL:
                kind = "i64"
            if value not in INT32:
                kind = "i64"
    return kind


def converted(tape: Tape, value: Any, kind: str) -> Symbol:  # noqa: ANN401 - symbol or number
    """Return a symbol of a kind."""
    if isinstance(value, Symbol):
        return cast(value, kind)
    if type(value) is bool:
        return cast(tape.add("const", BOOL, int(value)), kind)
    if kind in FLOATS:
        return cast(tape.number(_as_float(value), "f32"), kind)
    if value not in INT64:
        raise refusal(f"{value} is beyond 64 bits")
    number = tape.number(int(value), "i32" if value in INT32 else "i64")
    return cast(number, kind)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _values(args: Sequence[Any]) -> tuple[Tape, list[Any]]:
    """Return the tape, and the operands with captured 0-dimensional tensors read."""
    tape = next(one.tape for one in args if isinstance(one, Symbol | View))
    found = []
    for one in args:
        value = one
        if isinstance(one, torch.Tensor):
            if one.dim() != 0:
                raise refusal(
                    f"a captured tensor {list(one.shape)} is used as a whole: index it to a number"
                )
            value = read(tape, one, [])
        elif isinstance(one, View):
            raise refusal("a captured tensor is used with dimensions left: index them too")
        elif not isinstance(one, Symbol) and type(one) not in (int, float, bool):
            raise refusal(f"a {type(one).__name__} takes part in arithmetic: numbers serve")
        found.append(value)
    return tape, found


# ---- Operations
def _binary(op: str, *, floats: bool = False) -> Callable[..., Symbol]:
    """Return the handler of an operation of two operands; `floats`: on floats alone."""

    def handler(one: Any, other: Any) -> Symbol:  # noqa: ANN401 - symbol or number
        tape, values = _values((one, other))
        kind = _promoted(values)
        if floats and kind not in FLOATS:
            kind = "f32"
        if kind == BOOL:  # as torch has it, where it has it
            if op not in _OF_BOOLS:
                raise refusal(f"{op} of two bools: use &, | and ~")
            return _node(_OF_BOOLS[op], BOOL, tape, values)
        return _node(op, kind, tape, values)

    return handler


_OF_BOOLS: Final = {"add": "or", "mul": "and", "max": "or", "min": "and"}


def _node(op: str, kind: str, tape: Tape, values: Sequence[Any]) -> Symbol:
    return tape.add(op, kind, *(converted(tape, value, kind).idx for value in values))


def _unary(op: str, *, floats: bool = True) -> Callable[[Any], Symbol]:
    def handler(one: Any) -> Symbol:  # noqa: ANN401
        tape, values = _values((one,))
        kind = values[0].kind
        if floats and kind not in FLOATS:
            kind = "f32"
        if kind == BOOL:
            raise refusal(f"{op} of a bool")
        return _node(op, kind, tape, values)

    return handler


def _rounded(op: str) -> Callable[..., Symbol]:
    def handler(one: Symbol, *, decimals: int = 0) -> Symbol:
        if decimals != 0:
            raise refusal("round with decimals")
        return one if one.kind in INTEGERS else _unary(op)(one)

    return handler


def _bits(op: str, *, is_logical: bool = False) -> Callable[..., Symbol]:
    def handler(one: Any, other: Any) -> Symbol:  # noqa: ANN401
        tape, values = _values((one, other))
        if is_logical:
            return _node(op, BOOL, tape, [_truth(tape, value) for value in values])
        kind = _promoted(values)
        if kind in FLOATS:
            raise refusal(f"bitwise {op} of floats")
        return _node(op, kind, tape, values)

    return handler


def _truth(tape: Tape, value: Any) -> Symbol:  # noqa: ANN401 - symbol or number
    if isinstance(value, Symbol):
        return cast(value, BOOL)
    return tape.add("const", BOOL, int(bool(value)))


def _not(one: Symbol) -> Symbol:
    if one.kind in FLOATS:
        raise refusal("~ of a float")
    return one.tape.add("not", one.kind, one.idx)


def _compared(op: str) -> Callable[..., Symbol]:
    def handler(one: Any, other: Any) -> Symbol:  # noqa: ANN401
        tape, values = _values((one, other))
        kind = _promoted(values)
        sides = [converted(tape, value, kind).idx for value in values]
        return tape.add(op, BOOL, *sides)

    return handler


def _divided(one: Any, other: Any, *, rounding_mode: str | None = None) -> Symbol:  # noqa: ANN401
    if rounding_mode is None:
        return _binary("div", floats=True)(one, other)
    if rounding_mode not in ("floor", "trunc"):
        raise refusal(f"rounding_mode={rounding_mode!r}")
    return _binary("floordiv" if rounding_mode == "floor" else "truncdiv")(one, other)


def _where(condition: Any, one: Any = None, other: Any = None) -> Symbol:  # noqa: ANN401
    if one is None or other is None:
        raise refusal("torch.where needs three arguments")
    tape, (condition, one, other) = _values((condition, one, other))
    if isinstance(one, Symbol) or isinstance(other, Symbol):
        kind = _promoted((one, other))
    elif type(one) is bool and type(other) is bool:
        kind = BOOL
    else:  # numbers alone: torch's default kinds
        has_float = isinstance(one, float) or isinstance(other, float)
        kind = "f32" if has_float else "i64"
    sides = [converted(tape, value, kind).idx for value in (one, other)]
    return tape.add("where", kind, _truth(tape, condition).idx, *sides)


def _clamped(one: Any, min: Any = None, max: Any = None) -> Symbol:  # noqa: ANN401 - torch's
    if min is not None:
        one = _binary("max")(one, min)
    return one if max is None else _binary("min")(one, max)


def _masked_fill(one: Any, mask: Any, value: Any) -> Symbol:  # noqa: ANN401
    tape, (one, mask, value) = _values((one, mask, value))
    filled = converted(tape, value, one.kind)
    return tape.add("where", one.kind, _truth(tape, mask).idx, filled.idx, one.idx)


def _power(one: Any, other: Any) -> Symbol:  # noqa: ANN401
    if type(other) is int and 0 <= other <= 3 and isinstance(one, Symbol):
        found = one if other else converted(one.tape, 1, one.kind)
        for _ in range(other - 1):
            found = _binary("mul")(found, one)
        return found
    return _binary("pow")(one, other)


def _to(one: Symbol, *args: Any, dtype: torch.dtype | None = None, **others: Any) -> Symbol:  # noqa: ANN401
    for given in (*args, dtype):
        if isinstance(given, torch.dtype):
            return _as(given)(one)
        if isinstance(given, Symbol):
            return cast(one, given.kind)
        if isinstance(given, torch.Tensor):
            return _as(given.dtype)(one)
    return one


def _as(dtype: torch.dtype) -> Callable[..., Symbol]:
    def handler(one: Symbol, **others: Any) -> Symbol:  # noqa: ANN401 - memory formats
        kind = KIND_OF.get(dtype)
        if kind is None:
            raise refusal(f"a symbol is cast to {dtype}")
        return cast(one, "f32" if kind in WIDE else kind)

    return handler


def _full(value: Any) -> Callable[..., Symbol]:  # noqa: ANN401 - a number, or None: it is given
    def handler(one: Symbol, *args: Any, dtype: torch.dtype | None = None, **others: Any) -> Symbol:  # noqa: ANN401
        given = value
        rest = args
        if given is None:
            given = others.pop("fill_value", None)
            if given is None:
                *rest, given = args  # type: ignore[assignment]
        shape = others.get("size", rest[0] if rest else ())
        if tuple(shape) != ():
            raise refusal(f"a tensor {list(shape)} is made: only 0-dimensional ones serve")
        kind = one.kind if dtype is None else KIND_OF.get(dtype, "")
        if kind == BOOL:
            return one.tape.add("const", BOOL, int(bool(given)))
        return converted(one.tape, given, "f32" if kind in WIDE else kind)

    return handler


def _like(value: float) -> Callable[..., Symbol]:
    def handler(one: Symbol, *, dtype: torch.dtype | None = None, **others: Any) -> Symbol:  # noqa: ANN401
        return _full(value)(one, (), dtype=dtype)

    return handler


def _same(one: Symbol, *args: Any, **others: Any) -> Symbol:  # noqa: ANN401 - shapes, devices
    return one


def _relu(one: Symbol) -> Symbol:
    return _where(_compared("le")(one, 0), converted(one.tape, 0, one.kind), one)


def _any_of(op: str) -> Callable[..., Symbol]:
    """Return a minimum or maximum of two; torch's of one tensor is the tensor itself."""

    def handler(one: Any, other: Any = None) -> Symbol:  # noqa: ANN401
        return one if other is None else _binary(op)(one, other)

    return handler


def _addcmul(one: Any, two: Any, three: Any, *, value: float = 1) -> Symbol:  # noqa: ANN401
    product = _binary("mul")(two, three)
    return _binary("add")(one, product if value == 1 else _binary("mul")(product, value))


def _lerp(one: Any, other: Any, weight: Any) -> Symbol:  # noqa: ANN401
    return _binary("add")(one, _binary("mul")(weight, _binary("sub")(other, one)))


def _scaled(op: str) -> Callable[..., Symbol]:
    """Return a sum or difference, whose second operand may be multiplied."""

    def handler(one: Any, other: Any, *, alpha: float = 1) -> Symbol:  # noqa: ANN401
        return _binary(op)(one, other if alpha == 1 else _binary("mul")(other, alpha))

    return handler


def added(one: Symbol, other: Any) -> Symbol:  # noqa: ANN401 - a symbol or a number
    """Return a sum."""
    return _binary("add")(one, other)


def _square(one: Symbol) -> Symbol:
    return _binary("mul")(one, one)


_FLOOR: Final = _binary("floordiv")
_OPERATIONS: Final[dict[str, Callable[..., Any]]] = {
    "add": _scaled("add"), "sub": _scaled("sub"), "subtract": _scaled("sub"),
    "mul": _binary("mul"), "multiply": _binary("mul"),
    "div": _divided, "divide": _divided, "true_divide": _binary("div", floats=True),
    "truediv": _binary("div", floats=True), "floordiv": _FLOOR, "floor_divide": _FLOOR,
    "mod": _binary("mod"), "remainder": _binary("mod"), "fmod": _binary("fmod"),
    "pow": _power, "float_power": _binary("pow", floats=True), "square": _square,
    "neg": _unary("neg", floats=False), "negative": _unary("neg", floats=False), "pos": _same,
    "positive": _same,
    "abs": _unary("abs", floats=False), "absolute": _unary("abs", floats=False),
    "sign": _unary("sign", floats=False), "sgn": _unary("sign", floats=False),
    "floor": _rounded("floor"), "ceil": _rounded("ceil"), "trunc": _rounded("trunc"),
    "fix": _rounded("trunc"), "round": _rounded("round"),
    "minimum": _binary("min"), "maximum": _binary("max"), "min": _any_of("min"),
    "max": _any_of("max"), "fmin": _binary("min"), "fmax": _binary("max"),
    "clamp": _clamped, "clip": _clamped, "clamp_min": _binary("max"), "clamp_max": _binary("min"),
    "lt": _compared("lt"), "less": _compared("lt"), "le": _compared("le"),
    "less_equal": _compared("le"), "gt": _compared("gt"), "greater": _compared("gt"),
    "ge": _compared("ge"), "greater_equal": _compared("ge"), "eq": _compared("eq"),
    "ne": _compared("ne"), "not_equal": _compared("ne"),
    "and": _bits("and"), "bitwise_and": _bits("and"), "or": _bits("or"), "bitwise_or": _bits("or"),
    "xor": _bits("xor"), "bitwise_xor": _bits("xor"), "invert": _not, "bitwise_not": _not,
    "logical_and": _bits("and", is_logical=True), "logical_or": _bits("or", is_logical=True),
    "logical_xor": _bits("xor", is_logical=True),
    "logical_not": lambda one: _not(_truth(one.tape, one)),
    "lshift": _bits("shl"), "bitwise_left_shift": _bits("shl"),
    "rshift": _bits("shr"), "bitwise_right_shift": _bits("shr"),
    "where": _where, "masked_fill": _masked_fill, "relu": _relu,
    "addcmul": _addcmul, "lerp": _lerp, "atan2": _binary("atan2", floats=True),
    "arctan2": _binary("atan2", floats=True),
    "to": _to, "type_as": _to, "float": _as(torch.float32), "half": _as(torch.float16),
    "bfloat16": _as(torch.bfloat16), "int": _as(torch.int32), "long": _as(torch.int64),
    "short": _as(torch.int16), "char": _as(torch.int8), "byte": _as(torch.uint8),
    "bool": _as(torch.bool), "double": _as(torch.float64), "type": _to,
    "clone": _same, "contiguous": _same, "detach": _same, "view": _same, "reshape": _same,
    "squeeze": _same, "cpu": _same, "cuda": _same, "expand": _same,
    "new_ones": _full(1), "new_zeros": _full(0), "new_full": _full(None), "new_tensor": _full(None),
    "ones_like": _like(1), "zeros_like": _like(0), "full_like": _full(None),
    "isnan": _unary("isnan"), "isinf": _unary("isinf"),
    **{name: _unary(name) for name in (
        "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "tanh",
        "sigmoid", "sin", "cos", "tan", "sinh", "cosh", "atan", "erf",
    )},
    "arctan": _unary("atan"), "special_expit": _unary("sigmoid"),
}  # fmt: skip


def _detach(one: Symbol) -> Symbol:
    return one.tape.add("detach", one.kind, one.idx)


def _test(op: str) -> Callable[[Symbol], Symbol]:
    def handler(one: Symbol) -> Symbol:
        if one.kind not in FLOATS:
            return one.tape.add("const", BOOL, 0)
        return one.tape.add(op, BOOL, one.idx)

    return handler


OPERATIONS.update(_OPERATIONS, isnan=_test("isnan"), isinf=_test("isinf"), detach=_detach)


def _install_operators() -> None:
    """Give symbols Python's operators."""
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
                 "lshift", "rshift"):  # fmt: skip
        handler = OPERATIONS[name]
        for method, own in ((f"__{name}__", handler), (f"__r{name}__", swapped(handler))):
            setattr(Symbol, method, _method(name, own))
    for name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert"):
        setattr(Symbol, f"__{name}__", _method(name, OPERATIONS[name]))


def _method(name: str, handler: Callable[..., Symbol]) -> Callable[..., Any]:
    return lambda self, *args: handled(name, handler, (self, *args), {})


_install_operators()

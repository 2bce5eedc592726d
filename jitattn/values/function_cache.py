"""Keeps traced functions, by the code and by all that it can reach: a warm call traces nothing.

A function's identity is its code, and what its closure, its defaults and the globals that it names
hold: numbers by value, tensors, functions and modules by identity. A function that can reach
anything else (an object with attributes, a list that may change) is traced at every call.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.values.functions import Function, MovedScore, traced

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from jitattn.values.masks import MaskMod

_MOST_KEPT: Final = 1024
_DEEPEST: Final = 8
_BY_VALUE: Final = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
#: Modules whose functions and classes have no state that a function could read.
_STATELESS: Final = frozenset(("torch", "math", "operator", "builtins", "functools", "_operator"))
_kept: dict[Hashable, tuple[str, tuple[float, ...], tuple[weakref.ref[torch.Tensor], ...]]] = {}


class _UnknownError(Exception):
    """Something whose value may change without a trace."""


def function_of(
    score_mod: Callable[..., Any] | MovedScore | None, mask: MaskMod | None
) -> Function:
    """Return `traced` of a score and a mask function, from an earlier call if nothing changed.

    Raises
    ------
    InvalidInputError, UnsupportedError
        As `traced`.
    """
    tensors: dict[int, torch.Tensor] = {}
    try:
        key = (_identity(score_mod, tensors, 0), _identity_of_mask(mask, tensors))
    except _UnknownError:
        return traced(score_mod, mask)
    kept = _kept.get(key)
    if kept is not None:
        program, numbers, references = kept
        found = tuple(reference() for reference in references)
        if all(one is not None for one in found):  # else the identity is of another tensor
            return Function(program, numbers, found)  # type: ignore[arg-type]
    function = traced(score_mod, mask)
    if all(tensors.get(id(one)) is one for one in function.tensors):  # none was made while tracing
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        references = tuple(weakref.ref(one) for one in function.tensors)
        _kept[key] = (function.program, function.numbers, references)
    return function


def _identity_of_mask(mask: MaskMod | None, tensors: dict[int, torch.Tensor]) -> Hashable:
    if mask is None:
        return None
    kind, parts = mask.parts
    if kind:
        return (kind, *(_identity_of_mask(part, tensors) for part in parts))
    return _identity(mask.function, tensors, 0), _identity(mask.q_offset, tensors, 0)


def _identity(value: Any, tensors: dict[int, torch.Tensor], depth: int) -> Hashable:  # noqa: ANN401
    """Return what a value is, as a key; collect the tensors in it."""
    kind = type(value)
    if kind in _BY_VALUE:
        return kind, value
    if isinstance(value, torch.Tensor):
        tensors[id(value)] = value
        return "tensor", id(value), value.dtype, value.dim()
    if depth > _DEEPEST:
        raise _UnknownError
    deeper = functools.partial(_identity, tensors=tensors, depth=depth + 1)
    if kind is types.FunctionType and _is_of_a_module(value):
        return "stateless", id(value)
    if kind is types.FunctionType:
        return (
            value.__code__,
            *(deeper(_held(cell)) for cell in value.__closure__ or ()),
            *(deeper(one) for one in value.__defaults__ or ()),
            *((name, deeper(one)) for name, one in (value.__kwdefaults__ or {}).items()),
            *((name, deeper(value.__globals__[name])) for name in _globals_of(value.__code__)
              if name in value.__globals__),
        )  # fmt: skip
    if kind is functools.partial:
        named = tuple((name, deeper(one)) for name, one in value.keywords.items())
        return "partial", deeper(value.func), tuple(map(deeper, value.args)), named
    if kind in (tuple, MovedScore):
        return kind, tuple(map(deeper, value))
    home = value.__name__ if kind is types.ModuleType else getattr(value, "__module__", None)
    if isinstance(home, str) and home.partition(".")[0] in _STATELESS and _is_part(value):
        return "stateless", id(value)
    raise _UnknownError


def _is_of_a_module(function: types.FunctionType) -> bool:
    """Return whether a function is one of torch's or Python's modules, as long as the process.

    One that such a module has made is not: and_masks of torch returns a closure, which holds masks,
    and whose identity may be another's later.
    """
    home = function.__module__
    if not isinstance(home, str) or home.partition(".")[0] not in _STATELESS:
        return False
    return getattr(sys.modules.get(home), function.__qualname__, None) is function


def _is_part(value: Any) -> bool:  # noqa: ANN401
    """Return whether a value is a module, a class or a function of one, which lives on."""
    kinds = (types.ModuleType, type, types.BuiltinFunctionType, torch._ops.OpOverloadPacket)
    return isinstance(value, kinds)


def _held(cell: types.CellType) -> Any:  # noqa: ANN401
    try:
        return cell.cell_contents
    except ValueError as error:  # nothing yet
        raise _UnknownError from error


@functools.lru_cache(1024)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that code, and code within it, may look up in its globals."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_globals_of(constant))
    return tuple(names)

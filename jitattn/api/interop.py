"""Converts arrays of other libraries over DLPack, and results back to the same kind.

Each array is converted once per call; torch tensors are not converted. No library but torch is
imported here: the namespace is taken from the array. The protocol orders the streams: the producer
makes torch's current stream wait for the array, the consumer makes its own stream wait for torch's.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.utils.dlpack

from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Exceptions of DLPack producers and consumers for arrays that they do not support.
_DLPACK_ERRORS: Final = (BufferError, TypeError, ValueError, RuntimeError, AttributeError)


def is_tensor(x: object) -> bool:
    """Return whether `x` is a torch tensor, which needs no conversion."""
    return isinstance(x, torch.Tensor)


def kind_of(x: object) -> str:
    """Return the library of an array: 'torch', 'numpy', 'cupy', 'jax' …."""
    if isinstance(x, torch.Tensor):
        return "torch"
    space = _namespace(x)
    name = getattr(space, "__name__", type(x).__module__)
    return str(name).partition(".")[0]


def from_any(x: object, *, name: str = "array", writable: bool = False) -> torch.Tensor:
    """Return a torch tensor over the memory of an array, without a copy.

    Parameters
    ----------
    x : array with ``__dlpack__``, or Tensor
        CuPy, JAX, numpy, or anything else that speaks DLPack. A torch tensor is returned as it is.
    name : str
        Name of the array in error messages.
    writable : bool, default False
        Whether the tensor will be written to; a read-only array is refused then.

    Raises
    ------
    InvalidInputError
        `x` speaks no DLPack, torch cannot hold it, or it may not be written to.
    """
    if isinstance(x, torch.Tensor):
        return x
    _require_dlpack(x, name)
    # torch aborts the process on a negative stride that comes in through DLPack.
    strides = getattr(x, "strides", None)
    if isinstance(strides, tuple) and any(stride < 0 for stride in strides):
        raise InvalidInputError(
            f"{name} has negative strides {strides}: torch holds no such array; "
            "pass a contiguous copy of it"
        )
    if writable:
        _require_writable(x, name)
    try:
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(x)
    except _DLPACK_ERRORS as error:
        raise InvalidInputError(
            f"{name} is a {_type_name(x)} of dtype {getattr(x, 'dtype', 'unknown')}: it could not "
            f"be taken over through DLPack ({_first_line(error)}); pass an array of fp16, bf16 or "
            "fp32 that its library can export, or a torch.Tensor"
        ) from error
    return tensor


def from_all(inputs: Mapping[str, object], *, out: object = None) -> dict[str, torch.Tensor]:
    """Return the tensors over several arrays of one library.

    Parameters
    ----------
    inputs : mapping of argument name to array
        Read only; all of one kind.
    out : array, optional
        Written to, so it must be writable; of the same kind. It comes back as ``"out"``.

    Raises
    ------
    InvalidInputError
        The arrays are of different libraries, or one of them cannot be taken over.
    """
    arrays = dict(inputs) if out is None else {**inputs, "out": out}
    for name, x in arrays.items():
        _require_dlpack(x, name)
    kinds = {name: kind_of(x) for name, x in arrays.items()}
    if len(set(kinds.values())) > 1:
        raise InvalidInputError(
            "q, k, v and out must all come from one library (got "
            + ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
            + "); convert them to one kind, for instance with torch.from_dlpack"
        )
    return {name: from_any(x, name=name, writable=name == "out") for name, x in arrays.items()}


def to_kind_of(result: torch.Tensor, like: object) -> Any:  # noqa: ANN401 - any library's array
    """Return `result` as the kind of array that `like` is, over the same memory.

    Parameters
    ----------
    result : Tensor
        It is detached first: DLPack carries no gradient.
    like : array or Tensor
        For a torch tensor, `result` itself comes back.

    Raises
    ------
    InvalidInputError
        The library of `like` imports no DLPack, or cannot hold the dtype of `result` (numpy has no
        bfloat16).
    """
    if isinstance(like, torch.Tensor):
        return result
    space = _namespace(like)
    importer = getattr(space, "from_dlpack", None)
    if importer is None:
        raise InvalidInputError(
            f"q is a {_type_name(like)}: its library has no from_dlpack, so the result cannot be "
            "given back as that kind; pass torch tensors and convert the result yourself"
        )
    try:
        return importer(result.detach())
    except _DLPACK_ERRORS as error:
        raise InvalidInputError(
            f"the result has dtype {result.dtype}: {kind_of(like)} cannot hold it "
            f"({_first_line(error)}); ask for out_dtype=torch.float32 or pass torch tensors"
        ) from error


def _namespace(x: object) -> object | None:
    """Return the array namespace of `x`, else the top module of its type, if it has either."""
    if hasattr(x, "__array_namespace__"):
        space: object = x.__array_namespace__()
        return space
    return sys.modules.get(type(x).__module__.partition(".")[0])


def _require_dlpack(x: object, name: str) -> None:
    if not hasattr(x, "__dlpack__"):
        raise InvalidInputError(
            f"{name} is a {_type_name(x)}: it must be a torch.Tensor, or an array that speaks "
            f"DLPack (CuPy, JAX, numpy); convert it first, for instance by torch.as_tensor({name})"
        )


def _require_writable(x: object, name: str) -> None:
    flags = getattr(x, "flags", None)
    if kind_of(x) == "jax" or getattr(flags, "writeable", True) is False:
        raise InvalidInputError(
            f"{name} is a read-only {_type_name(x)}: it will be written to; "
            f"pass a writable array, or leave {name} out"
        )


def _type_name(x: object) -> str:
    kind = type(x)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

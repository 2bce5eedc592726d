"""Checks tensor arguments and returns their addresses and strides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn import Parameter

from jitattn.errors import InvalidInputError, NestedError, StridesError, WithoutMemoryError
from jitattn.spec.enums import Dtype

if TYPE_CHECKING:
    from collections.abc import Iterable

DTYPES: Final[dict[torch.dtype, Dtype]] = {
    torch.float16: Dtype.FP16,
    torch.bfloat16: Dtype.BF16,
    torch.float32: Dtype.FP32,
}
#: Dtypes of the CPU path.
CPU_DTYPES: Final = (*DTYPES, torch.float64)
MAX_HEAD_DIM: Final = 256
#: Tensor classes without behaviour of their own; some have no memory.
PLAIN: Final = frozenset((Tensor, Parameter))
#: Address of a placeholder. No parameter struct can hold it, so nothing is launched.
NO_ADDRESS: Final = -1
#: Lower addresses get a second check: they may be offsets in a storage without memory. (No device
#: address below 2^33 was observed.)
LOW_ADDRESS: Final = 1 << 36


def strides_of(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor; the last one must be 1 or belong to a dimension of size 1."""
    try:
        stride = tensor.stride()
    except RuntimeError as error:  # sparse, nested …
        raise _no_plain_memory(name, tensor) from error
    if tensor.layout is not torch.strided:
        raise _no_plain_memory(name, tensor)
    if stride[-1] != 1 and tensor.shape[-1] > 1:
        raise StridesError(
            f"{name} has strides {tuple(stride)}: the last one must be 1; "
            f"call {name}.contiguous() first"
        )
    return stride


def address_of(name: str, tensor: Tensor) -> int:
    """Return the address of a tensor of values; `NO_ADDRESS` for a placeholder.

    It is 0 for a tensor without elements, and for a CPU tensor inside a torch.func transform, which
    the CPU path supports.

    Raises
    ------
    InvalidInputError
        Its memory was freed, holds other values, or cannot be read by a kernel.
    """
    if tensor.is_neg():
        raise InvalidInputError(
            f"{name} is a lazy negation (a view of a conjugate): its memory holds other values; "
            f"call {name}.resolve_neg() first"
        )
    return index_address(name, tensor)


def index_address(name: str, tensor: Tensor) -> int:
    """Return the address of a tensor of integers or bools, as `address_of`."""
    if type(tensor) not in PLAIN and is_placeholder(tensor):  # some classes warn about data_ptr
        return NO_ADDRESS
    try:
        address = tensor.data_ptr()
    except RuntimeError as error:
        if is_transformed(tensor):
            return NO_ADDRESS if tensor.is_cuda else 0
        if is_placeholder(tensor):
            return NO_ADDRESS
        raise _no_plain_memory(name, tensor) from error
    if address < LOW_ADDRESS:
        return _low_address(name, tensor, address)
    return address


def readable(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor that kernels can read, with a lazy negation resolved.

    Raises
    ------
    InvalidInputError
        It has no memory.
    """
    tensor = tensor.resolve_neg()
    if index_address(name, tensor) == NO_ADDRESS:
        raise WithoutMemoryError(f"{name} is a {type(tensor).__name__} without memory")
    return tensor


def _low_address(name: str, tensor: Tensor, address: int) -> int:
    if not tensor.numel() or address != tensor.storage_offset() * tensor.element_size():
        return address
    if is_placeholder(tensor):
        return NO_ADDRESS
    if type(tensor) not in PLAIN:
        raise _no_plain_memory(name, tensor)
    raise InvalidInputError(
        f"{name} has shape {list(tensor.shape)}, but no memory: its storage was resized to "
        f"{tensor.untyped_storage().nbytes()} bytes; fill it again before the call"
    )


def is_placeholder(tensor: Tensor) -> bool:
    """Return whether a tensor has no values: meta, fake or functional."""
    return tensor.is_meta or is_fake(tensor) or torch._is_functional_tensor(tensor)


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a torch.func transform: grad, vmap, jvp …."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def has_symbols(tensors: Iterable[Tensor]) -> bool:
    """Return whether a shape or a stride is symbolic, as in graphs for any length."""
    return any(
        not isinstance(number, int)
        for tensor in tensors
        for number in (*tensor.shape, *tensor.stride())
    )


def refuse_nested(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse nested tensors, strided and jagged.

    Raises
    ------
    InvalidInputError
    """
    for name, tensor in tensors:
        if tensor.is_nested:
            raise _no_plain_memory(name, tensor)


def _no_plain_memory(name: str, tensor: Tensor) -> InvalidInputError:
    if tensor.is_nested:
        return NestedError(
            f"{name} is a nested tensor of layout {tensor.layout}: attention takes sequences of "
            f"different lengths one after another; pass {name}.values() (of layout torch.jagged) "
            "or torch.cat(list), and say where they lie with q_seqs and kv_seqs, as "
            "Ragged.from_cu_seqlens(offsets, max_length)"
        )
    return InvalidInputError(
        f"{name} is a {type(tensor).__name__} of layout {tensor.layout}: it must be a strided "
        "tensor with memory of its own; call .to_dense() or take it out of the transform"
    )


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the prefix: 'float16'."""
    return str(dtype).removeprefix("torch.")

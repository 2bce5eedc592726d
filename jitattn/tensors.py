"""Which tensors are taken, and where they lie in memory: address and strides, or why none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from jitattn.errors import InvalidInputError
from jitattn.jit.enums import Dtype

if TYPE_CHECKING:
    from torch import Tensor

DTYPES: Final[dict[torch.dtype, Dtype]] = {
    torch.float16: Dtype.FP16,
    torch.bfloat16: Dtype.BF16,
    torch.float32: Dtype.FP32,
}
MAX_HEAD_DIM: Final = 256


def strides_of(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor whose last one is 1, or passed by no index."""
    try:
        stride = tensor.stride()
    except RuntimeError as error:  # sparse, nested …
        raise _no_plain_memory(name, tensor) from error
    if tensor.layout is not torch.strided:
        raise _no_plain_memory(name, tensor)
    if stride[-1] != 1 and tensor.shape[-1] > 1:
        raise InvalidInputError(
            f"{name} has strides {tuple(stride)}: the last one must be 1; "
            f"call {name}.contiguous() first"
        )
    return stride


def address_of(name: str, tensor: Tensor) -> int:
    """Return the address of a tensor; 0 for one on the CPU that has none (inside torch.func)."""
    if tensor.is_neg():
        raise InvalidInputError(
            f"{name} is a lazy negation (a view of a conjugate): its memory holds other values; "
            f"call {name}.resolve_neg() first"
        )
    try:
        return tensor.data_ptr()
    except RuntimeError as error:
        if tensor.is_cpu:
            return 0
        raise _no_plain_memory(name, tensor) from error


def _no_plain_memory(name: str, tensor: Tensor) -> InvalidInputError:
    return InvalidInputError(
        f"{name} is a {type(tensor).__name__} of layout {tensor.layout}: it must be a strided "
        "tensor with memory of its own; call .to_dense() or take it out of the transform"
    )

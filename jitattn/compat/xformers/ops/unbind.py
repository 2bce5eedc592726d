"""Takes packed q, k and v apart, and finds out whether tensors are parts of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Return `torch.unbind`; its gradients are stacked by torch."""
    return torch.unbind(x, dim)


def get_stack_strides(tensors: Sequence[Tensor], dim: int) -> tuple[int, ...] | None:
    """Return the strides of the tensor that tensors are slices of along `dim`; None if of none."""
    if len(tensors) < 2 or dim > tensors[0].dim():
        return None
    first = tensors[0]
    step = tensors[1].storage_offset() - first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for number, x in enumerate(tensors):
        if (
            x.shape != first.shape
            or x.stride() != first.stride()
            or x.storage_offset() != first.storage_offset() + number * step
            or x.untyped_storage().data_ptr() != storage
        ):
            return None
    strides = first.stride()
    return *strides[:dim], int(step), *strides[dim:]


def stack_or_none(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """Return ``torch.stack(tensors, dim)`` as a view of their storage; None if that takes a copy.

    Differentiable: gradients reach each of the tensors.
    """
    strides = get_stack_strides(tensors, dim)
    if strides is None:
        return None
    stacked: Tensor = _Stack.apply(dim, strides, *tensors)  # type: ignore[no-untyped-call]
    return stacked


class _Stack(torch.autograd.Function):
    """A view of several tensors as one, whose gradient is taken apart again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        dim: int,
        strides: tuple[int, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.dim = dim  # type: ignore[attr-defined]
        shape = list(tensors[0].shape)
        shape.insert(dim, len(tensors))
        return tensors[0].as_strided(shape, strides)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, *gradient.unbind(ctx.dim)  # type: ignore[attr-defined]

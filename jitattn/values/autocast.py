"""Autocast: casts the inputs of a call, and is disabled inside, where a gear sets the numerics."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import torch
from torch.autograd import Function

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")
_KINDS: Final = ("cpu", "cuda")


def outside_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function to run with autocast disabled for every device type."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return wrapped(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped


def cast_inputs(kind: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast floating tensors but fp64 ones to the autocast dtype of a device type, as SDPA's are.

    Where autocast is disabled they are returned as they are. Gradients come back in each tensor's
    own dtype.
    """
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [
        x if x is None or not x.is_floating_point() or x.dtype is torch.float64 else x.to(dtype)
        for x in tensors
    ]


@outside_autocast
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices [..., m, k] and [..., k, n]; leading dimensions are broadcast.

    As `torch.matmul`, with derivatives of every order and in forward mode; the products of a
    backward pass, which may itself run inside autocast, are also computed outside of it.
    """
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        in_transform = torch._C._are_functorch_transforms_active()
        function = _TransformableProduct if in_transform else _Product
        product: Tensor = function.apply(a, b)  # type: ignore[no-untyped-call]
        return product
    return torch.matmul(a, b)


class _Derivatives(Function):
    """Derivatives of a matrix product, also computed outside of autocast."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN401
        """Compute the gradients of inputs that require them."""
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        d_a = matmul(gradient, b.transpose(-2, -1)) if needs_a else None
        d_b = matmul(a.transpose(-2, -1), gradient) if needs_b else None
        return _summed(d_a, a), _summed(d_b, b)

    @staticmethod
    def jvp(ctx: Any, d_a: Tensor | None, d_b: Tensor | None) -> Tensor | None:  # noqa: ANN401
        """Compute the tangent of the product."""
        a, b = ctx.saved_tensors
        parts = []
        if d_a is not None:
            parts.append(matmul(d_a, b))
        if d_b is not None:
            parts.append(matmul(a, d_b))
        return sum(parts[1:], parts[0]) if parts else None


class _Product(_Derivatives):
    """Matrix product with the least host work."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # noqa: ANN401 - autograd's
        """Multiply."""
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        return torch.matmul(a, b)


class _TransformableProduct(_Derivatives):
    """Matrix product that supports torch.func transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        """Multiply."""
        return torch.matmul(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 - autograd's
        """Save both matrices."""
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


def _summed(gradient: Tensor | None, of: Tensor) -> Tensor | None:
    """Sum a gradient over the broadcast dimensions of a matrix."""
    if gradient is None or gradient.shape == of.shape:
        return gradient
    return gradient.sum_to_size(of.shape)

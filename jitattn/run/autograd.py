"""Autograd functions of the GPU path: forward kernels, and backward kernels on request.

The CPU path needs none of this: it consists of differentiable operations, with derivatives of every
order and forward mode.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function

from jitattn.errors import NO_FORWARD_MODE, NO_SECOND_ORDER, InternalError, UnsupportedError
from jitattn.request.norm import RowOrder
from jitattn.request.scores import ADDED, captured_names
from jitattn.run import normalize
from jitattn.run.backward import run_backward
from jitattn.run.operator_encoding import with_tensors, without_tensors
from jitattn.values.autocast import outside_autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.request.problem import Call
    from jitattn.values.norm import L2Norm


class _Refused(Function):
    """An identity on gradients that refuses second-order differentiation."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        """Return the first `count` tensors, the gradients; the others are their dependencies."""
        del ctx
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ANN401
        """Refuse second-order differentiation."""
        raise UnsupportedError(NO_SECOND_ORDER)


def first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Run a backward pass without autograd; its results refuse to be differentiated again.

    (torch's `once_differentiable` is similar, but misses the case where only saved tensors require
    gradients, and its error names no way out.)
    """
    compute = outside_autocast(backward)

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        with torch.no_grad():
            found = compute(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        places = [idx for idx, value in enumerate(found) if isinstance(value, torch.Tensor)]
        sources = [x for x in (*gradients, *ctx.saved_tensors) if isinstance(x, torch.Tensor)]
        refused = _Refused.apply(len(places), *(found[idx] for idx in places), *sources)  # type: ignore[no-untyped-call]
        result = list(found)
        for idx, value in zip(places, refused, strict=True):
            result[idx] = value
        return tuple(result)

    return wrapped


class FirstOrder(Function):
    """Base of the kernels' autograd functions: refuses forward mode."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ANN401 - autograd's
        """Refuse forward mode."""
        raise UnsupportedError(NO_FORWARD_MODE)


class Attention(FirstOrder):
    """The autograd function of `attention`: q, k, v, biases and sinks in, out and LSE out."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        call: Call,
        compute: Callable[[], tuple[Tensor, Tensor | None]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *added: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute out and the LSE; return the LSE on request.

        `added`: the tensors of `ADDED`, or nothing if there are none; then those that a function
        captures.
        """
        del added  # in `call`
        out, lse = compute()
        if lse is None:
            raise InternalError("the LSE is missing")
        ctx.call, tensors = without_tensors(call)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return (out, lse) if call.return_lse else out

    @staticmethod
    @first_order
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        d_out: Tensor | None,
        d_lse: Tensor | None = None,
    ) -> Any:  # noqa: ANN401
        """Compute the first-order gradients."""
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if d_out is None:
            if d_lse is None:
                return (None,) * len(ctx.needs_input_grad)
            d_out = torch.zeros_like(out)
        call = with_tensors(ctx.call, tensors)
        needs = ctx.needs_input_grad[5:]
        names = (*ADDED, *captured_names(call.scores)) if needs else ()
        wanted = [name for name, needed in zip(names, needs, strict=True) if needed]
        found = run_backward(q, k, v, out, lse, d_out, d_lse, call, wanted)
        return (None, None, found.dq, found.dk, found.dv, *map(found.added.get, names))


class Normalize(FirstOrder):
    """The autograd function of L2 normalisation: q, k and head_scale in, q and k out."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        q: Tensor,
        k: Tensor,
        head_scale: Tensor | None,
        norm: L2Norm,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        """Normalise q and k."""
        ctx.save_for_backward(q, k, head_scale)
        ctx.groups, ctx.rows = norm.groups, RowOrder.of(call)
        ctx.set_materialize_grads(False)
        return normalize.normalized(q, k, norm, call)

    @staticmethod
    @first_order
    def backward(ctx: Any, d_q: Tensor | None, d_k: Tensor | None) -> Any:  # noqa: ANN401
        """Compute the first-order gradients."""
        q, k, head_scale = ctx.saved_tensors
        wants_scale = ctx.needs_input_grad[2]
        dq, dk, d_scale = normalize.normalized_grad(
            (q, k), (d_q, d_k), head_scale, ctx.groups, ctx.rows, wants_scale=wants_scale
        )
        return dq, dk, d_scale, None, None


def apply(function: type[Function], *inputs: object) -> Any:  # noqa: ANN401 - autograd's
    """Apply an autograd function to tensors with memory, outside transforms.

    `Function.apply` would first search every tensor for torch.func transforms.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    base: Any = super(Function, function)
    return base.apply(*inputs)

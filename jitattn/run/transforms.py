"""Autograd functions for torch.func transforms on a GPU: grad, vjp, jacrev, vmap, and nested ones.

Functions that torch.func can transform need `setup_context`, for which torch binds arguments by
name at every call (some 30 us); so only calls inside a transform come here. The operators
(operators.py) do the work. Forward mode and second-order gradients need the CPU path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from jitattn.errors import NO_SECOND_ORDER, UnsupportedError
from jitattn.run.autograd import FirstOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from jitattn.run.operator_encoding import Encoded

#: The mapped dimension of each input, None for inputs that are not mapped.
_Dims: TypeAlias = "Sequence[int | None]"


def attention_in_transform(q: Tensor, k: Tensor, v: Tensor, given: Encoded) -> tuple[Tensor, ...]:
    """Return out and LSE of an encoded call."""
    found: tuple[Tensor, ...] = _Attention.apply(  # type: ignore[no-untyped-call]
        given.ints, given.floats, q, k, v, *given.tensors
    )
    return found


class _Attention(FirstOrder):
    """The transformable function of ``jitattn::attention``: tensors in, out and LSE out."""

    @staticmethod
    def forward(ints: list[int], floats: list[float], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Compute out and LSE."""
        q, k, v, *others = tensors
        out, lse = torch.ops.jitattn.attention(q, k, v, others, ints, floats)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401
        """Save the tensors that the gradient depends on."""
        ctx.ints, ctx.floats, *tensors = inputs
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:  # noqa: ANN401
        """Compute the gradients of all tensors."""
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        wanted = [idx for idx in range(len(needed) - 3) if needed[3 + idx]]
        found = _Backward.apply(ctx.ints, ctx.floats, wanted, d_out, d_lse, *saved)  # type: ignore[no-untyped-call]
        gradients: list[Tensor | None] = [None] * len(needed)
        for place, gradient in zip((0, 1, 2, *(3 + idx for idx in wanted)), found, strict=True):
            gradients[place] = gradient
        return None, None, *gradients

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: _Dims,
        ints: list[int],
        floats: list[float],
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Compute in one merged batch if possible, else one entry after another."""

        def once(*parts: Tensor) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = _Attention.apply(ints, floats, *parts)  # type: ignore[no-untyped-call]
            return found

        is_simple = len(tensors) == 3 and _dims(tensors, in_dims[2:])[0] == 4
        return _mapped(once, info.batch_size, in_dims[2:], tensors, is_simple)


class _Backward(FirstOrder):
    """The transformable function of ``jitattn::attention_backward``; it has no gradient."""

    @staticmethod
    def forward(
        ints: list[int], floats: list[float], wanted: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of q, k, v and of the other `wanted` tensors."""
        d_out, d_lse, out, lse, q, k, v, *others = tensors
        found = torch.ops.jitattn.attention_backward(
            d_out, d_lse, q, k, v, out, lse, others, ints, floats, wanted
        )
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ANN401
        """Refuse second-order differentiation."""
        raise UnsupportedError(NO_SECOND_ORDER)

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: _Dims,
        ints: list[int],
        floats: list[float],
        wanted: list[int],
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Compute in one merged batch if possible, else one entry after another."""

        def once(*parts: Tensor) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = _Backward.apply(ints, floats, wanted, *parts)  # type: ignore[no-untyped-call]
            return found

        is_simple = len(tensors) == 7 and _dims(tensors, in_dims[3:])[0] == 4
        return _mapped(once, info.batch_size, in_dims[3:], tensors, is_simple)


def _dims(tensors: Sequence[Tensor], in_dims: _Dims) -> list[int]:
    """Return the number of dimensions of each tensor inside the map."""
    return [x.dim() - (dim is not None) for x, dim in zip(tensors, in_dims, strict=True)]


def _mapped(
    function: Callable[..., tuple[Tensor, ...]],
    size: int,
    in_dims: _Dims,
    tensors: Sequence[Tensor],
    is_simple: bool,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Map a function over a dimension of its tensors; in the results it comes first.

    `is_simple`: every tensor has a leading batch dimension whose entries are treated alike, so the
    mapped dimension is merged into the batch.
    """
    moved = [
        x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=True)
    ]
    if is_simple:
        whole = [
            x.expand(size, *x.shape) if dim is None else x
            for x, dim in zip(moved, in_dims, strict=True)
        ]
        batch = whole[0].shape[1]
        results = function(*(x.flatten(0, 1) for x in whole))
        return tuple(x.unflatten(0, (size, batch)) for x in results), (0,) * len(results)
    rows = [
        function(*(x if dim is None else x[idx] for x, dim in zip(moved, in_dims, strict=True)))
        for idx in range(size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    return stacked, (0,) * len(stacked)

"""Results over some of the keys, merged under autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jitattn.compat._errors import DoorError
from jitattn.compat.xformers.ops.fmha._functions import (
    memory_efficient_attention_partial,
    merge_attentions,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from jitattn.compat.xformers.ops.fmha._bias import AttentionBias


class Partial:
    """A result over some of the keys, with its LSE; made by the function below."""

    def __init__(self, attn: Tensor, lse: Tensor) -> None:
        self._attn = attn
        self._lse = lse

    def is_bmghk(self) -> bool:
        """Return whether heads are in groups: [B, L, G, H, D]."""
        return self._attn.dim() == 5

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Partial:
        """Apply a function of tensors [B, L, H, D], which leaves D alone, to result and LSE."""
        rows_second = self._lse.movedim(-1, 1).unsqueeze(-1)
        return Partial(fn(self._attn), fn(rows_second).squeeze(-1).movedim(1, -1))


def memory_efficient_attention_partial_autograd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,  # noqa: ANN401
    output_dtype: torch.dtype | None = None,
) -> Partial:
    """Compute `memory_efficient_attention_partial` as a `Partial`."""
    return Partial(
        *memory_efficient_attention_partial(
            query, key, value, attn_bias, p, scale, op=op, output_dtype=output_dtype
        )
    )


def merge_attentions_autograd(*partials: Partial) -> Tensor:
    """Merge results over disjoint sets of keys."""
    if not partials:
        raise DoorError("merge_attentions_autograd(): give one result or more")
    out, _ = merge_attentions([one._attn for one in partials], [one._lse for one in partials])
    return out

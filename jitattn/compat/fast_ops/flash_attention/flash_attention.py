"""Attention of [B, H, L, D], dense or nested, with a bias and a causal flag.

What the original's documentation promises and its code never had is here: `causal`, `attn_bias`
with its gradient, and nested tensors. Its limits are lifted: head dims from 1 to 256, any strides,
fp32, and other head dims for V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.attention import attention
from jitattn.errors import InvalidInputError
from jitattn.masks import Causal, Full
from jitattn.sequences import Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class FlashAttentionFunction:
    """Attention with the calling convention of an autograd function."""

    @staticmethod
    def apply(
        Q: Tensor,  # noqa: N803 - the original's names
        K: Tensor,  # noqa: N803
        V: Tensor,  # noqa: N803
        attn_bias: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Compute attention; differentiable, the bias included.

        Parameters
        ----------
        Q : Tensor, [B, H, M, D]
            Or nested: B sequences [H, M_b, D], strided or jagged (then [B, H, j, D]).
        K, V : Tensor, [B, H, N, D]
            Nested if Q is. Fewer heads that divide H are fine.
        attn_bias : Tensor, [B or 1, H or 1, M or 1, N], optional
            Added to the scores; dtype of Q, or fp32. With nested tensors, of their largest lengths.
        causal : bool
            Let query i see keys up to i: aligned to the top left, as in the original.

        Returns
        -------
        Tensor, as Q
            Rows that see nothing are 0.

        Raises
        ------
        InvalidInputError
        """
        mask = Causal("top_left") if causal else Full()
        are_nested = [x.is_nested for x in (Q, K, V)]
        if not any(are_nested):
            out: Tensor = attention(Q, K, V, mask=mask, layout="bhsd", bias=attn_bias)
            return out
        if not all(are_nested):
            raise InvalidInputError(
                "Q, K and V: all of them must be nested tensors, or none; make the others nested "
                "with torch.nested.as_nested_tensor(list(tensor))"
            )
        ours, theirs = _Flat(Q), _Flat(K)
        out = attention(
            ours.values,
            theirs.values,
            _Flat(V).values,
            mask=mask,
            bias=attn_bias,
            q_seqs=ours.sequences,
            kv_seqs=theirs.sequences,
        )
        return ours.nest(out)


def multi_head_attention(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # noqa: N803
    """Compute attention of [B, H, L, D]; as `FlashAttentionFunction.apply`."""
    return FlashAttentionFunction.apply(Q, K, V)


class _Flat:
    """The sequences of a nested tensor, one after another: [total, H, D]."""

    def __init__(self, nested: Tensor) -> None:
        self._layout = nested.layout
        if nested.dim() != 4:
            raise InvalidInputError(
                f"a nested tensor has {nested.dim()} dimensions: it must be B sequences [H, L, D]"
            )
        parts: Sequence[Tensor] = nested.unbind()
        self._lengths = [part.shape[1] for part in parts]
        if not parts:
            raise InvalidInputError("a nested tensor has no sequences: there must be at least one")
        self.values = torch.cat([part.transpose(0, 1) for part in parts])
        cumulative = torch.tensor([0, *self._lengths]).cumsum(0).to(torch.int32)
        self.sequences = Ragged.from_cu_seqlens(
            cumulative.to(nested.device), max_length=max(self._lengths)
        )

    def nest(self, flat: Tensor) -> Tensor:
        """Make a result of these sequences nested in the same way."""
        parts = torch.split(flat, self._lengths)
        if self._layout is torch.jagged:
            joined = torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)
            return joined.transpose(1, 2)
        return torch.nested.as_nested_tensor([part.transpose(0, 1) for part in parts])

"""Attention of [B, H, L, D], dense or nested, with a bias and a causal flag.

What the original's documentation promises and its code never had is here: `causal`, `attn_bias`
with its gradient, and nested tensors. Its limits are lifted: head dims from 1 to 256, any strides,
fp32, and other head dims for V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jitattn.compat._core import attention
from jitattn.compat._errors import ExtensionError, errors_as
from jitattn.values.masks import Causal, Full
from jitattn.values.nested import flattened

if TYPE_CHECKING:
    from torch import Tensor

#: The core's argument names in error messages, and this door's.
_WORDS: Final = {
    "q": "Q",
    "k": "K",
    "v": "V",
    "q_seqs": "Q",
    "kv_seqs": "K",
    "bias": "attn_bias",
    "max_length": "max_seqlen to torch.nested.nested_tensor_from_jagged",
    "check the layout argument": "the layout is [B, H, L, D]",
}
_FULL: Final = Full()
_TOP_LEFT: Final = Causal("top_left")


class FlashAttentionFunction:
    """Attention with the calling convention of an autograd function.

    It is none: `apply` is a function, and differentiable as one; there are no `forward`, `backward`
    and `setup_context`.
    """

    @staticmethod
    @errors_as(ExtensionError, _WORDS)
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
            Nested if Q is, with lengths of their own that K and V share. Jagged ones that share
            their offsets too are told to without waiting for the device. Their largest length is
            read from it if torch does not know it, once for all tensors of the same offsets, but
            not while a CUDA graph is captured. Fewer heads that divide H are fine.
        attn_bias : Tensor, [B or 1, H or 1, M or 1, N], optional
            Added to the scores; dtype of Q, or fp32. With nested tensors, of their largest lengths.
        causal : bool
            Let query i see keys up to i: aligned to the top left, as in the original.

        Returns
        -------
        Tensor, as Q
            Rows that see nothing are 0. A jagged one has the offsets of Q, and so can be added to
            it.

        Raises
        ------
        ExtensionError
            Tensors do not fit together; a RuntimeError, and an InvalidInputError.
        """
        mask = _TOP_LEFT if causal else _FULL
        if attn_bias is not None and attn_bias.is_nested:
            raise ExtensionError(
                "attn_bias is nested: it must be a dense tensor [B, H, M, N] of the largest "
                "lengths; call torch.nested.to_padded_tensor(attn_bias, 0.0)"
            )
        if not (Q.is_nested or K.is_nested or V.is_nested):
            out: Tensor = attention(Q, K, V, mask=mask, layout="bhsd", bias=attn_bias)
            return out
        _check_nested(Q, K, V)
        q, k, v = flattened("Q", Q, 2), flattened("K", K, 2), flattened("V", V, 2)
        k.check_like(v)
        out = attention(
            q.values,
            k.values,
            v.values,
            mask=mask,
            bias=attn_bias,
            q_seqs=q.sequences(),
            kv_seqs=k.sequences(),
        )
        nested: Tensor = q.nest(out)
        return nested


def _check_nested(Q: Tensor, K: Tensor, V: Tensor) -> None:  # noqa: N803
    """Refuse tensors of which some are nested, or with other numbers of sequences."""
    named = {"Q": Q, "K": K, "V": V}
    for name, tensor in named.items():
        if not tensor.is_nested:
            raise ExtensionError(
                f"{name} is not nested: Q, K and V must all be nested tensors, or none; nest it in "
                "the layout of the others (torch.nested)"
            )
    counts = [tensor.size(0) for tensor in named.values()]
    if len(set(counts)) != 1:
        raise ExtensionError(
            f"Q, K and V have {counts[0]}, {counts[1]} and {counts[2]} sequences: they must have "
            "as many, and at least one"
        )


def multi_head_attention(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # noqa: N803
    """Compute attention of [B, H, L, D]; as `FlashAttentionFunction.apply`."""
    return FlashAttentionFunction.apply(Q, K, V)

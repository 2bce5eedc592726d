"""Attention with a bias, under the names of the original's Triton functions.

Limits of the original are lifted: any lengths, head dims from 1 to 256, fp32, GQA, CPU tensors, and
gradients of the bias. `causal` is aligned to the top left, as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jitattn.compat._core import attention
from jitattn.compat._errors import CheckFailedError, errors_as
from jitattn.values.masks import Causal, Full

if TYPE_CHECKING:
    from torch import Tensor

_WORDS: Final = {
    "scale": "softmax_scale",
    "check the layout argument": "the layout is [B, L, H, D]",
}


@errors_as(CheckFailedError, _WORDS)
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Compute attention; differentiable, the bias included.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D]
    k, v : Tensor, [B, Lkv, Hkv, D]
    bias : Tensor, [B or 1, Hq or 1, Lq or 1, Lkv], optional
        Dtype of q, or fp32.
    causal : bool
        Let query i see keys up to i.
    softmax_scale : float, default 1 / sqrt(D); 0 means the default, too

    Returns
    -------
    Tensor, [B, Lq, Hq, D]
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    mask = Causal("top_left") if causal else Full()
    out: Tensor = attention(q, k, v, mask=mask, scale=softmax_scale or None, bias=bias)
    return out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Compute `flash_attn_func` of kv [B, Lkv, 2, Hkv, D], without a copy."""
    k, v = kv.unbind(-3)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Compute `flash_attn_func` of qkv [B, L, 3, H, D], without a copy."""
    q, k, v = qkv.unbind(-3)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)


class FlashAttnFunc:
    """The function class of `flash_attn_func`, with `apply`."""

    apply = staticmethod(flash_attn_func)


class FlashAttnKVPackedFunc:
    """The function class of `flash_attn_kvpacked_func`."""

    apply = staticmethod(flash_attn_kvpacked_func)


class FlashAttnQKVPackedFunc:
    """The function class of `flash_attn_qkvpacked_func`."""

    apply = staticmethod(flash_attn_qkvpacked_func)

"""Reference attention of the original's tests: dense, and also returns its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.values.autocast import matmul, outside_autocast

if TYPE_CHECKING:
    from torch import Tensor


@outside_autocast
def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    upcast: bool = True,
    reorder_ops: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute attention with all scores in memory.

    Parameters
    ----------
    q : Tensor, [B, Lq, H, D]
    k, v : Tensor, [B, Lkv, H, D]
    query_padding_mask : Tensor, [B, Lq], bool, optional
        Rows where it is False are 0.
    key_padding_mask : Tensor, [B, Lkv], bool, optional
        True = attend.
    dropout_p : float
        By which weights that stay are scaled.
    dropout_mask : Tensor, [B, H, Lq, Lkv], bool, optional
        True = keep.
    causal : bool
        Aligned to the top left.
    bias : Tensor, [B or 1, H or 1, Lq or 1, Lkv], optional
    upcast : bool
        Compute in fp32.
    reorder_ops : bool
        Scale k rather than q, which rounds differently in 16 bits.

    Returns
    -------
    out : Tensor, [B, Lq, H, D], dtype of q
    attention : Tensor, [B, H, Lq, Lkv], dtype of q
        Weights before dropout; 0 for rows that see nothing.
    """
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    scale = q.shape[-1] ** -0.5
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = (q, k * scale) if reorder_ops else (q * scale, k)
    scores = matmul(q, k.transpose(2, 3))
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    hidden = torch.zeros(scores.shape[2:], dtype=torch.bool, device=q.device)
    if causal:
        hidden = torch.ones_like(hidden).triu(1)
    if key_padding_mask is not None:
        hidden = hidden | ~key_padding_mask[:, None, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    weights = weights.masked_fill((scores == float("-inf")).all(3, keepdim=True), 0.0)
    kept = weights if dropout_mask is None else weights.masked_fill(~dropout_mask, 0.0)
    out = (matmul(kept, v) / (1.0 - dropout_p)).transpose(1, 2)
    if query_padding_mask is not None:
        out = out.masked_fill(~query_padding_mask[:, :, None, None], 0.0)
        weights = weights.masked_fill(~query_padding_mask[:, None, :, None], 0.0)
    return out.to(dtype), weights.to(dtype)

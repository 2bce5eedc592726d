"""Cosine attention in plain PyTorch, in the dtype of its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.api.l2norm import l2norm
from jitattn.values.autocast import matmul, outside_autocast

if TYPE_CHECKING:
    from torch import Tensor


@outside_autocast
def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    groups: int,
    causal: bool,
) -> Tensor:
    """Compute attention with all scores in memory; the arguments are checked already.

    Parameters
    ----------
    q : Tensor, [B, Hq, Lq, D]
    k, v : Tensor, [B, Hkv, Lkv, D]
    mask : Tensor, [B, Lkv], bool, optional
        True = attend.
    bias : Tensor, [B or 1, Hq or 1, Lq, Lkv], or by distance [Hq or 1, 2 R + 1], optional
        Of another dtype, scores and weights have the wider one.
    scale : float
    groups : int
        Slices that are normalised; 0 for none.
    causal : bool
        Aligned to the bottom right.

    Returns
    -------
    Tensor, [B, Hq, Lq, Dv], dtype of q
        Rows that see nothing are 0.
    """
    batch, heads, len_q, _ = q.shape
    heads_kv, len_kv = k.shape[1:3]
    if groups:
        q, k = l2norm(q, groups), l2norm(k, groups)
    # Query heads are grouped by kv head, so that keys and values are not repeated.
    side_by_side = (batch, heads_kv, heads // max(1, heads_kv) * len_q)
    q = (q * scale).reshape(*side_by_side, q.shape[3])
    scores = matmul(q, k.transpose(2, 3)).view(batch, heads, len_q, len_kv)
    lowest = torch.finfo(scores.dtype).min
    if bias is not None:
        lowest = torch.finfo(torch.promote_types(scores.dtype, bias.dtype)).min
        if bias.dim() == 2:
            bias = bias[:, _columns(bias, len_q, len_kv)]
        scores = scores + bias.clamp(min=lowest / 2)  # -inf would give NaN rows
    hidden = None if mask is None else ~mask[:, None, None, :]
    if causal:
        future = torch.ones(len_q, len_kv, dtype=torch.bool, device=q.device)
        future = future.triu(len_kv - len_q + 1)
        hidden = future if hidden is None else hidden | future
    if hidden is not None:
        scores = scores.masked_fill(hidden, lowest / 2)
    weights = scores.softmax(dim=3).to(v.dtype).reshape(*side_by_side, len_kv)
    out = matmul(weights, v).view(batch, heads, len_q, v.shape[3])
    sees_all_some = mask is None and bias is None and not (causal and len_q > len_kv)
    if sees_all_some or len_kv == 0:
        return out
    return out.masked_fill(scores.detach().amax(dim=3, keepdim=True) <= lowest / 4, 0.0)


def _columns(table: Tensor, len_q: int, len_kv: int) -> Tensor:
    """Return the entry of a table by distance that each pair has, [Lq, Lkv]."""
    reach = table.shape[1] // 2
    query = torch.arange(len_kv - len_q, len_kv, device=table.device)
    distance = torch.arange(len_kv, device=table.device) - query[:, None]
    return distance.clamp(-reach, reach) + reach

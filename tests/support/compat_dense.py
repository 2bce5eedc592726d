"""Dense fp64 attention with a mask as a matrix: truth for sageattention, xformers, FA3 and FA4."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out [B, Lq, H, Dv], lse [B, H, Lq]) in fp64, the LSE without sinks.

    q is [B, Lq, H, D], k [B, Lkv, Hkv, D], v [B, Lkv, Hkv, Dv]; `seen` (True = attend) and `bias`
    are broadcast to [B, H, Lq, Lkv].
    """
    group = q.shape[2] // max(1, k.shape[2])
    wide_k, wide_v = (x.double().repeat_interleave(group, 2) for x in (k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), wide_k) * factor
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    blind = torch.isneginf(scores).all(-1, keepdim=True)
    safe = scores.masked_fill(blind, 0.0)
    lse = torch.logsumexp(safe, -1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.double()[:, None])
    weights = torch.exp(safe - total[..., None]).masked_fill(blind, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, wide_v)
    return out, lse.masked_fill(blind[..., 0], float("-inf"))


def around(
    len_q: int,
    len_kv: int,
    left: int | None,
    right: int | None,
    *,
    bottom_right: bool = True,
    chunk: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return which pairs a window shows, bool [Lq, Lkv]; None for no bound."""
    i = torch.arange(len_q, device=device)[:, None] + (len_kv - len_q if bottom_right else 0)
    j = torch.arange(len_kv, device=device)
    seen = torch.ones(len_q, len_kv, dtype=torch.bool, device=device)
    if left is not None:
        seen &= j >= i - left
    if right is not None:
        seen &= j <= i + right
    if chunk:
        seen &= torch.div(i, chunk, rounding_mode="floor") == j // chunk
    return seen

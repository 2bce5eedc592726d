"""Calls of the flash-cosine-sim-attention door, and a dense fp64 reference of its documentation."""

from __future__ import annotations

import torch
from torch import Tensor

B, H, LQ, LK, D = 2, 4, 33, 50, 32


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
) -> Tensor:
    """Compute the original's documented semantics, dense in fp64."""
    merged = q.dim() == 3
    if merged:
        q, attn_bias_batch_dim = q[:, None], True
    k, v = (x[:, None] if x.dim() == 3 else x for x in (k, v))
    q, k, v = q.double(), k.double(), v.double()
    if l2norm_qk:
        q, k = (
            torch.nn.functional.normalize(x.unflatten(3, (groups, -1)), dim=-1).flatten(3)
            for x in (q, k)
        )
    group = q.shape[1] // k.shape[1] if k.shape[1] > 1 else 1
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = scale * q @ k.transpose(2, 3)
    if attn_bias is not None and attn_bias.dim() == 2:
        rows, columns = (torch.arange(size, device=q.device) for size in scores.shape[2:])
        reach = attn_bias.shape[1] // 2
        distance = columns - (rows[:, None] + len(columns) - len(rows))
        scores = scores + attn_bias.double()[:, distance.clamp(-reach, reach) + reach]
    elif attn_bias is not None:
        scores = scores + (attn_bias[:, None] if attn_bias_batch_dim else attn_bias[None])
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if causal:
        rows, columns = scores.shape[2:]
        hidden |= hidden.new_ones(rows, columns).triu(columns - rows + 1)
    if mask is not None:
        hidden |= ~mask[:, None, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(3).nan_to_num(0.0)
    out = weights @ v
    return out[:, 0] if merged else out


def tensors(
    merged: bool = False, single: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    front, kv_front = ((B * H,), (B * H,)) if merged else ((B, H), (B,) if single else (B, H))
    sizes = ((*front, LQ, D), (*kv_front, LK, D), (*kv_front, LK, D))
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


BIAS = torch.randn(B * H, LQ, LK, generator=torch.Generator().manual_seed(4))
MASK = torch.rand(B, LK, generator=torch.Generator().manual_seed(5)) < 0.7
CASES: dict[str, tuple[dict[str, object], dict[str, bool]]] = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {}),
    "mask": ({"mask": MASK}, {}),
    "mask and causal": ({"mask": MASK, "causal": True}, {}),
    "bias": ({"attn_bias": BIAS[:H]}, {}),
    "bias of batches": ({"attn_bias": BIAS[:B], "attn_bias_batch_dim": True}, {}),
    "bias by distance": ({"attn_bias": BIAS[0, :H, :21].contiguous(), "causal": True}, {}),
    "bias by distance, of all heads": ({"attn_bias": BIAS[0, :1, :9].contiguous()}, {}),
    "scale and groups": ({"scale": 10, "groups": 4}, {}),
    "large scale": ({"scale": 100.0}, {}),
    "as they are": ({"l2norm_qk": False, "scale": 0.3}, {}),
    "single head": ({"causal": True}, {"single": True}),
    "merged": ({"causal": True, "attn_bias": BIAS}, {"merged": True}),
}

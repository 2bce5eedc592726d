"""Baseline of tolerances: plain PyTorch in the numerics of the gear.

For 16-bit inputs those are FlashAttention-2's: fp32 products and sums, P rounded to 16 bits, the
row sum not. The order differs from every kernel: keys are reversed, and the division is at the end.
A kernel's error may be about as large as this one's.
"""

from __future__ import annotations

import torch

from jitattn.reference import Scores, attended
from jitattn.values.masks import Full, Mask

FULL = Full()
NO_CHANGES = Scores()


def baseline(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask = FULL,
    scale: float | None = None,
    layout: str = "bshd",
    out_dtype: torch.dtype | None = None,
    changes: Scores = NO_CHANGES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) in the numerics of the dtype, shaped as `reference`. Requires TF32 off."""
    in_dtype = q.dtype
    q, k, v = q.float(), k.float().flip(1 if layout == "bshd" else 2), v.float()
    v = v.flip(1 if layout == "bshd" else 2)
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    heads_q, heads_kv = q.shape[1], k.shape[1]
    if k.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q, k = (x.to(in_dtype).float() for x in changes.unit(q, k))  # rounded, as a kernel does
    if scale is None:
        scale = q.shape[3] ** -0.5 if changes.qk_norm is None else 8.0
    attend = attended(
        mask, q.shape[0], heads_q, heads_kv, q.shape[2], k.shape[2], device=q.device
    ).flip(3)

    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if changes != NO_CHANGES:
        scores = changes.apply(scores.flip(3)).flip(3)
    scores = scores.masked_fill(~attend, float("-inf"))
    if scores.shape[3] == 0:
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = q.new_full(q.shape[:3], float("-inf"))
    else:
        highest = scores.amax(3, keepdim=True)
        highest = highest.masked_fill(highest == float("-inf"), 0.0)
        weights = torch.exp(scores - highest)
        row_sum = weights.sum(3, keepdim=True)
        kept = changes.drop(weights.flip(3)).flip(3)
        sums = torch.matmul(kept.to(in_dtype).float(), v)
        total = row_sum.masked_fill(row_sum == 0, 1.0)
        if changes.sinks is not None:
            total = total + torch.exp(changes.sinks.view(1, -1, 1, 1) - highest)
        out = sums / total
        lse = (row_sum.log() + highest).squeeze(3)
    if layout == "bshd":
        out = out.transpose(1, 2)
    return out.to(in_dtype if out_dtype is None else out_dtype), lse

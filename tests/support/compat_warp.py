"""Dense fp64 reference of WarpAttention's documented semantics, and random calls of it."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Return out [M, Hq, D] of one sequence."""
    group = q.shape[1] // k.shape[1]
    wide = [x.double().repeat_interleave(group, 1) for x in (k, v)]
    scores = torch.einsum("ihd,jhd->hij", q.double(), wide[0])
    scores = scores * (q.shape[2] ** -0.5 if scale is None else scale)
    if causal:
        i = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
        hidden = torch.arange(len(k), device=q.device) > i
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hij,jhd->ihd", torch.softmax(scores, 2).nan_to_num(0.0), wide[1])


def call(seed: int, dtype: torch.dtype, device: str) -> tuple[dict[str, Any], Tensor, list[Tensor]]:
    """Draw the arguments of a call; return them, the truth and the tensors with gradients."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, heads_kv = chance.choice((1, 3)), chance.choice((1, 2))
    heads, dim = heads_kv * chance.choice((1, 3)), chance.choice((16, 32, 40))
    causal, scale = chance.random() < 0.5, chance.choice((None, 0.2))
    index = chance.choice((torch.int64, torch.int32))
    given: dict[str, Any] = {
        "scale": scale,
        "is_causal": causal,
        "version": chance.choice((-1, -1, 0, 1, 2)),
        "gear": chance.choice((None, 0, 2, 3)),
    }
    sides = {}
    for side, names, count, most in (
        ("q", ("query",), heads, chance.choice((1, 5, 70))),
        ("kv", ("key", "value"), heads_kv, chance.choice((9, 130))),
    ):
        is_ragged = chance.random() < 0.6
        lengths = [chance.randint(0, most) if is_ragged else most for _ in range(batch)]
        room = [length + chance.randint(0, 3) if is_ragged else length for length in lengths]
        starts = [sum(room[:b]) for b in range(batch)]
        for name in names:
            x = torch.randn(sum(room), count, dim, generator=generator).to(device, dtype)
            given[name] = x if is_ragged else x.view(batch, most, count, dim)
            given[name] = given[name].requires_grad_()
        if is_ragged:
            given[f"{side}_seq_start"], given[f"{side}_seq_len"] = (
                torch.tensor(numbers, dtype=index, device=device) for numbers in (starts, lengths)
            )
            given[f"{side}_max_seq_len"] = chance.choice((-1, most))
        sides[side] = [slice(a, a + n) for a, n in zip(starts, lengths, strict=True)]
    flat = [given[name].flatten(0, -3) for name in ("query", "key", "value")]
    truth = torch.zeros(flat[0].shape, dtype=torch.float64, device=device)
    for rows, keys in zip(sides["q"], sides["kv"], strict=True):
        own = dense(flat[0][rows], flat[1][keys], flat[2][keys], scale, causal)
        truth = truth.index_copy(0, torch.arange(truth.shape[0], device=device)[rows], own)
    leaves = [given[name] for name in ("query", "key", "value")]
    return given, truth.view_as(given["query"]), leaves

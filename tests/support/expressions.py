"""Random score functions, as trees of what a user might write."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor


class Captured:
    """Tensors that functions read: a table by head and distance, ids by sequence, a scale."""

    def __init__(self, device: str, batch: int, heads: int, length: int) -> None:
        generator = torch.Generator().manual_seed(11)
        self.table = torch.randn(heads, 2 * length, generator=generator).to(device)
        self.ids = torch.randint(0, 4, (batch, length), generator=generator).to(device)
        self.weights = torch.rand(4, generator=generator).to(device, torch.bfloat16)


def random_mask(seed: int, captured: Captured) -> Any:
    """Return a function (b, h, q_idx, kv_idx) -> bool, always the same one for a seed."""
    score = random_function(seed, captured, truth=True)
    return lambda b, h, q, k: score(None, b, h, q, k)


def random_function(seed: int, captured: Captured, *, truth: bool = False) -> Any:
    """Return a function (score, b, h, q_idx, kv_idx), always the same one for a seed.

    Its values are bounded for bounded scores, and smooth enough that fp32 and fp64 agree on
    branches.
    """
    length, wants_truth = captured.ids.shape[1], truth

    def function(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Any:
        rng = random.Random(seed)

        def integer(depth: int) -> Any:
            kind = rng.randrange(9) if depth else rng.randrange(3)
            if kind == 0:
                return q - k
            if kind == 1:
                return rng.choice((q, k, h, b))
            if kind == 2:
                return captured.ids[b, rng.choice((q, k))]
            one = integer(depth - 1)
            number = rng.choice((-7, -3, 2, 5, 64))
            if kind == 3:
                return one // number
            if kind == 4:
                return one % number
            if kind == 5:
                return torch.div(one, number, rounding_mode="trunc") + torch.fmod(one, 9)
            if kind == 6:
                return (one * number).abs()
            if kind == 7:
                return torch.minimum(one, integer(depth - 1))
            return torch.where(is_true(depth - 1), one, number)

        def is_true(depth: int) -> Any:
            kind = rng.randrange(5)
            one, other = integer(max(0, depth - 1)), integer(0)
            if kind == 0:
                return one <= other
            if kind == 1:
                return (one != other) & (q + 30 >= k)
            if kind == 2:
                return ~(one > 3) | (k % 3 == 0)
            if kind == 3:
                return torch.logical_xor(one >= 0, other < rng.randrange(20))
            return one == other

        def real(depth: int) -> Any:
            kind = rng.randrange(12) if depth else rng.randrange(3)
            if kind == 0:
                return score
            if kind == 1:
                return captured.table[h, k - q + length]
            if kind == 2:
                return captured.weights[captured.ids[b, q]].float() * rng.choice((1.5, -0.5))
            one = real(depth - 1)
            if kind == 3:
                return one + real(depth - 1)
            if kind == 4:
                return torch.tanh(one / 3.0) * 2.0
            if kind == 5:
                return torch.sigmoid(one) * real(depth - 1).clamp(-3.0, 3.0)
            if kind == 6:
                return torch.where(is_true(depth - 1), one, real(depth - 1))
            if kind == 7:
                return one - 0.05 * integer(depth - 1).clamp(-40, 40)
            if kind == 8:
                return torch.sin(one) + torch.cos(0.5 * one)
            if kind == 9:
                return torch.sqrt(one * one + 1.0) - torch.log(one * one + 2.0)
            if kind == 10:
                return torch.exp(-one.abs())
            return torch.rsqrt(1.0 + one.square()) / (2.0 + torch.exp2(-one * one))

        return is_true(3) if wants_truth else real(4)

    return function

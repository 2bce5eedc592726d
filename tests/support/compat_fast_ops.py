"""Inputs for the fast-ops door."""

from __future__ import annotations

import torch
from torch import Tensor

LENGTHS_Q, LENGTHS_KV = (5, 33, 1, 20), (40, 7, 12, 33)
H, D = 3, 24


def dense_inputs(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Make q [B, Lq, H, D], k and v."""
    generator = torch.Generator().manual_seed(8)
    sizes = ((2, 33, H, D), (2, 50, H, D), (2, 50, H, D))
    return [
        torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes
    ]


def parts(lengths: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """Make sequences [H, L, D]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(H, length, D, generator=generator).to(device, dtype).requires_grad_()
        for length in lengths
    ]


def nested(sequences: list[Tensor], layout: torch.layout) -> Tensor:
    """Join sequences to a nested tensor [B, H, L, D] that requires grad."""
    if layout is torch.jagged:
        turned = [sequence.transpose(0, 1) for sequence in sequences]
        return torch.nested.as_nested_tensor(turned, layout=torch.jagged).transpose(1, 2)
    return torch.nested.as_nested_tensor(sequences)

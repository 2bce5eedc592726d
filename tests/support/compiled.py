"""Calls of jitattn as functions of tensors, to be compiled by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import jitattn
from jitattn import Causal, Full, KeyPadding, L2Norm, LocalStride, PerHead, Window

B, L, H, D = 2, 40, 4, 16


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, L, H, D, generator=generator).requires_grad_() for _ in range(3)]


def extra(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator).requires_grad_()


KEEP = torch.arange(L).expand(B, L) % 5 != 0
PATTERN = torch.eye(3, dtype=torch.bool)
STATE = torch.tensor([3, 4])
CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "plain": (lambda q, k, v: jitattn.attention(q, k, v), []),
    "causal": (lambda q, k, v: jitattn.attention(q, k, v, mask=Causal("top_left")), []),
    "scale": (lambda q, k, v: jitattn.attention(q, k, v, mask=Full(), scale=-0.3), []),
    "window": (
        lambda q, k, v: jitattn.attention(
            q, k, v, mask=Window(9, 0, 2) & KeyPadding(KEEP.to(q.device))
        ),
        [],
    ),
    "stride": (lambda q, k, v: jitattn.attention(q, k, v, mask=LocalStride(8, 2, 3)), []),
    "blocks": (
        lambda q, k, v: jitattn.attention(
            q, k, v, mask=jitattn.BlockSparse(PATTERN.to(q.device), 16)
        ),
        [],
    ),
    "heads": (
        lambda q, k, v: jitattn.attention(
            q, k, v, mask=PerHead([Full(), Causal(), Window(3, 0), LocalStride(8, 1, 2)])
        ),
        [],
    ),
    "biases": (
        lambda q, k, v, bias, relative, slopes, sinks: jitattn.attention(
            q,
            k,
            v,
            bias=bias,
            relative_bias=relative,
            alibi_slopes=slopes,
            sinks=sinks,
            softcap=3.0,
        ),
        [extra(1, H, L, L), extra(H, 7), extra(H), extra(H)],
    ),
    "dropout": (
        lambda q, k, v: jitattn.attention(q, k, v, dropout_p=0.3, dropout_state=STATE.to(q.device)),
        [],
    ),
    "cosine": (
        lambda q, k, v, scale: jitattn.attention(q, k, v, qk_norm=L2Norm(2, scale)),
        [extra(H)],
    ),
}

"""Tests the CPU path and the reference with scores far from 0 and sinks far from the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import jitattn
from jitattn.reference import reference

OFFSETS = (-1e4, -300.0, -95.0, 0.0, 90.0, 95.0, 300.0, 1e4)


def run(
    function: Callable[..., Any], dtype: torch.dtype, arguments: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Out, LSE, and all gradients through both."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 40, 2, 16, generator=generator) for _ in "qkv")
    own = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    more = {name: x.to(dtype).requires_grad_() for name, x in arguments.items()}
    out, lse = function(*own, mask=jitattn.Causal(), return_lse=True, **more)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    found = torch.autograd.grad([out, lse], [*own, *more.values()], weights)
    return [out.detach(), lse.detach(), *found]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shifted", ["nothing", "bias", "alibi_slopes", "relative_bias"])
def test_sinks_and_scores_far_apart(offset: float, shifted: str) -> None:
    arguments = {"sinks": torch.tensor([offset, offset / 2])}
    if shifted == "bias":
        arguments = {"sinks": torch.zeros(2), "bias": torch.full((1, 1, 1, 40), -offset)}
    elif shifted == "alibi_slopes":
        arguments = {"sinks": torch.zeros(2), "alibi_slopes": torch.full((2,), offset / 20)}
    elif shifted == "relative_bias":
        arguments = {"sinks": torch.zeros(2), "relative_bias": torch.full((1, 3), -offset)}
    truth = run(reference, torch.float64, arguments)
    wide = run(jitattn.attention, torch.float32, arguments)
    for got, true in zip(wide, truth, strict=True):
        assert torch.isfinite(true).all()
        assert torch.isfinite(got).all()
        size = max(1.0, float(true.abs().max()))
        # fp32 scores of 1e4 have no more digits than that.
        assert (got.double() - true).abs().max() < 5e-3 * size

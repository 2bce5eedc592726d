"""Tests `merge` on a GPU against the CPU path."""

from __future__ import annotations

import pytest
import torch

import jitattn
from tests.support.compare import rel_l2

INF = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 64), (40, 1, 1, 8, 128), (3, 2, 7, 2, 33)])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_against_the_cpu(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    parts, batch, rows, heads, dim = shape
    size = (batch, rows, heads, dim) if layout == "bshd" else (batch, heads, rows, dim)
    outs = torch.randn(parts, *size, dtype=dtype)
    lses = 3 * torch.randn(parts, batch, heads, rows)
    lses[:, 0, 0, 0] = -INF
    lses[1, :, -1] = -INF
    outs[1][lses[1].isneginf().transpose(1, 2) if layout == "bshd" else lses[1].isneginf()] = INF
    truth, lse_truth = jitattn.merge(outs, lses, layout=layout, out_dtype=torch.float32)
    for out_dtype in (dtype, torch.float32):
        out, lse = jitattn.merge(outs.cuda(), lses.cuda(), layout=layout, out_dtype=out_dtype)
        assert out.dtype is out_dtype
        assert rel_l2(out.cpu(), truth) < (1e-6 if out_dtype is torch.float32 else 4e-3)
        torch.testing.assert_close(lse.cpu(), lse_truth, rtol=1e-6, atol=1e-6)


def test_prefix_and_own_keys() -> None:
    """A prefix that several sequences share, computed once, merged with each one's own keys."""
    q = torch.randn(4, 1, 8, 64, device="cuda", dtype=torch.bfloat16)
    prefix, own = (
        torch.randn(batch, length, 2, 64, device="cuda", dtype=torch.bfloat16)
        for batch, length in ((1, 900), (4, 300))
    )
    rows = q.reshape(1, 4, 8, 64)
    out_prefix, lse_prefix = jitattn.attention(rows, prefix, prefix, return_lse=True)
    out_own, lse_own = jitattn.attention(q, own, own, return_lse=True)
    out, _ = jitattn.merge(
        [out_prefix.reshape(4, 1, 8, 64), out_own],
        [lse_prefix.reshape(8, 4, 1).transpose(0, 1).contiguous(), lse_own],
    )
    whole = torch.cat([prefix.expand(4, -1, -1, -1), own], dim=1)
    assert rel_l2(out, jitattn.reference.reference(q, whole, whole)) < 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_gradients(dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(4)
    outs = torch.randn(3, 2, 17, 4, 40, generator=generator)
    outs = (outs if layout == "bshd" else outs.transpose(2, 3)).to(dtype)
    lses = 2 * torch.randn(3, 2, 4, 17, generator=generator)
    lses[0, :, 1] = lses[:, 1, 2] = float("-inf")
    d_out = torch.randn(outs.shape[1:], generator=generator).to(dtype)
    d_lse = torch.randn(lses.shape[1:], generator=generator)
    d_lse[1, 2] = 0.0

    def gradients(device: str, wide: torch.dtype) -> list[torch.Tensor]:
        own = [outs.to(device, wide).requires_grad_(), lses.to(device).requires_grad_()]
        with torch.enable_grad():
            ends = jitattn.merge(own[0], own[1], layout=layout)
        return [
            x.cpu() for x in torch.autograd.grad(ends, own, (d_out.to(ends[0]), d_lse.to(device)))
        ]

    truth = gradients("cpu", torch.float32)
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    for got, true in zip(gradients("cuda", dtype), truth, strict=True):
        assert got.isfinite().all()
        assert rel_l2(got, true) < limit

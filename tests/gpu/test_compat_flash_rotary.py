"""Tests the FlashAttention door's rotary embedding on a GPU against the CPU path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jitattn.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

B, L, H, D = 2, 9, 4, 32
DTYPES = (torch.float16, torch.bfloat16)


def both(x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf on the GPU, and the same on the CPU."""
    return x.clone().cuda().requires_grad_(), x.clone().requires_grad_()


def check_alike(out: Tensor, wanted: Tensor, x: Tensor, true: Tensor) -> None:
    """Results and gradients differ by a rounding at most."""
    d_out = torch.randn(wanted.shape).to(wanted.dtype)
    with torch.enable_grad():
        out.backward(d_out.cuda())
        wanted.backward(d_out)
    assert x.grad is not None
    assert true.grad is not None
    eps = torch.finfo(x.dtype).eps
    for got, other in ((out, wanted), (x.grad, true.grad)):
        torch.testing.assert_close(got.detach().cpu(), other.detach(), atol=1e-6, rtol=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_ragged(dtype: torch.dtype, interleaved: bool, inplace: bool) -> None:
    x, true = both(torch.randn(20, H, D).to(dtype))
    cos, sin = torch.randn(2, 12, 8).to(dtype)
    cu_seqlens = torch.tensor([2, 11, 11, 17], dtype=torch.int32)
    offsets = torch.tensor([5, 0, -2], dtype=torch.int32)
    tail = (interleaved, inplace)
    with torch.enable_grad():
        out = apply_rotary_emb(
            x, cos.cuda(), sin.cuda(), *tail, offsets.cuda(), cu_seqlens=cu_seqlens.cuda()
        )
        wanted = apply_rotary_emb(true, cos, sin, *tail, offsets, cu_seqlens=cu_seqlens)
    check_alike(out, wanted, x, true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads_k", [H, 2])
@pytest.mark.parametrize("other_tables", [False, True])
def test_packed_qkv(dtype: torch.dtype, heads_k: int, other_tables: bool) -> None:
    shape = (B, L, 3, H, D) if heads_k == H else (B, L, H + 2 * heads_k, D)
    x, true = both(torch.randn(shape).to(dtype))
    tables = torch.randn(4 if other_tables else 2, 20, D // 2).to(dtype)
    heads = None if heads_k == H else H
    with torch.enable_grad():
        out = apply_rotary_emb_qkv_(x, *tables.cuda(), seqlen_offsets=3, num_heads_q=heads)
        wanted = apply_rotary_emb_qkv_(true, *tables, seqlen_offsets=3, num_heads_q=heads)
    assert out.data_ptr() == x.data_ptr()
    check_alike(out, wanted, x, true)


def test_packed_kv_and_the_module() -> None:
    x, true = both(torch.randn(B, L, 2, H, D).half())
    tables = torch.randn(2, 20, 8).half()
    with torch.enable_grad():
        out = apply_rotary_emb_kv_(x, *tables.cuda(), interleaved=True)
        wanted = apply_rotary_emb_kv_(true, *tables, interleaved=True)
    check_alike(out, wanted, x, true)
    module, qkv = RotaryEmbedding(D), torch.randn(B, L, 3, H, D)
    found = module(qkv.clone().cuda())
    torch.testing.assert_close(found.cpu(), module.cpu()(qkv.clone()), atol=1e-5, rtol=1e-5)


def test_gradient_with_gaps() -> None:
    """What is turned has gaps between q, k and v, and its copy has none."""
    x, true = both(torch.randn(B, L, 3, H, D).half())
    tables = torch.randn(2, 20, D // 2).half()
    with torch.enable_grad():
        out = apply_rotary_emb_qkv_(x, *tables.cuda())
        wanted = apply_rotary_emb_qkv_(true, *tables)
        more = torch.randn(B, L, 3, 2, D).half()
        out, wanted = torch.cat([out, more.cuda()], 3), torch.cat([wanted, more], 3)
    check_alike(out, wanted, x, true)

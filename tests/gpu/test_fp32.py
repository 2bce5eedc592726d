"""fp32 inputs at fp32 accuracy."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import jitattn
from tests.support.compare import max_error, rel_l2
from tests.support.inputs import random_qkv


def check_fp32(len_q: int, len_kv: int, head_dim: int, causal: bool) -> None:
    """Compare one call with fp64, and its worst value with that of plain fp32 products."""
    q, k, v = random_qkv(1, len_q, len_kv, 4, head_dim=head_dim, device="cuda", seed=len_q)
    mask = jitattn.Causal() if causal else jitattn.Full()
    out, lse = jitattn.attention(q, k, v, mask=mask, return_lse=True)
    truth, lse_truth = jitattn.reference.reference(q, k, v, mask=mask, return_lse=True)
    visible = torch.ones(len_q, len_kv, dtype=torch.bool, device="cuda")
    if causal:
        visible = visible.tril(len_kv - len_q)
    assert not torch.backends.cuda.matmul.allow_tf32
    with sdpa_kernel(SDPBackend.MATH):
        math_out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible
        ).transpose(1, 2)
    assert rel_l2(out, truth) <= 2e-6
    assert max_error(out, truth) <= 4 * max_error(math_out, truth)
    assert max_error(lse, lse_truth) <= 1e-5


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("len_q", "len_kv"), [(512, 4096), (8, 4096), (40, 1000)])
@pytest.mark.parametrize("causal", [False, True])
def test_as_accurate_as_fp32_products(head_dim: int, len_q: int, len_kv: int, causal: bool) -> None:
    check_fp32(len_q, len_kv, head_dim, causal)


@pytest.mark.parametrize("head_dim", [33, 80])  # one element at a time; no power of two
def test_other_head_dims(head_dim: int) -> None:
    check_fp32(512, 4096, head_dim, causal=True)


@pytest.mark.real_gpu
@pytest.mark.parametrize("causal", [False, True])
def test_long_queries(causal: bool) -> None:
    check_fp32(4096, 4096, 128, causal)

"""Tests the reference against hand-written arithmetic and torch."""

from __future__ import annotations

import math

import pytest
import torch

from jitattn.errors import InvalidInputError
from jitattn.reference import reference
from jitattn.values.masks import Causal, Full
from tests.support.inputs import random_qkv


def by_hand(q, k, v, sees, scale):
    """Loops and math.exp; sees(i, j) says whether query i sees key j."""
    batch, len_q, heads_q, head_dim = q.shape
    len_kv, heads_kv, head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    out = torch.zeros(batch, len_q, heads_q, head_dim_v, dtype=torch.float64)
    lse = torch.full((batch, heads_q, len_q), -math.inf, dtype=torch.float64)
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    for b in range(batch):
        for h in range(heads_q):
            kv_head = h // (heads_q // heads_kv)
            for i in range(len_q):
                weights = {
                    j: math.exp(
                        scale * sum(q[b][i][h][d] * k[b][j][kv_head][d] for d in range(head_dim))
                    )
                    for j in range(len_kv)
                    if sees(i, j)
                }
                if not weights:
                    continue
                total = sum(weights.values())
                lse[b, h, i] = math.log(total)
                for d in range(head_dim_v):
                    out[b, i, h, d] = (
                        sum(w * v[b][j][kv_head][d] for j, w in weights.items()) / total
                    )
    return out, lse


@pytest.mark.parametrize(
    ("mask", "sees"),
    [
        (Full(), lambda i, j: True),
        (Causal(), lambda i, j: j <= i + 3 - 5),
        (Causal("top_left"), lambda i, j: j <= i),
    ],
)
@pytest.mark.parametrize("scale", [None, -0.7, 0.0])
def test_equals_loops(mask, sees, scale):
    q, k, v = random_qkv(2, 5, 3, 4, 2, 3, 2, dtype=torch.float64)
    out, lse = reference(q, k, v, mask=mask, scale=scale, return_lse=True)
    out_hand, lse_hand = by_hand(q, k, v, sees, 3**-0.5 if scale is None else scale)
    torch.testing.assert_close(out, out_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, lse_hand, rtol=1e-12, atol=1e-12)


def test_equals_torch_sdpa():
    q, k, v = random_qkv(2, 9, 9, 4, head_dim=8, dtype=torch.float64)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(reference(q, k, v, mask=Causal(), layout="bhsd"), expected)


@pytest.mark.parametrize("return_lse", [False, True])
def test_layouts_agree(return_lse):
    q, k, v = random_qkv(2, 5, 7, 4, 2, 8, 6)
    bshd = reference(q, k, v, return_lse=return_lse)
    bhsd = reference(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        layout="bhsd",
        return_lse=return_lse,
    )
    if return_lse:
        assert torch.equal(bshd[1], bhsd[1])
        bshd, bhsd = bshd[0], bhsd[0]
    assert torch.equal(bshd, bhsd.transpose(1, 2))


@pytest.mark.parametrize(
    ("batch", "len_q", "len_kv", "heads_q", "heads_kv"),
    [(0, 3, 4, 2, 1), (2, 0, 4, 2, 1), (2, 3, 0, 2, 1), (2, 3, 4, 0, 0), (2, 3, 4, 0, 1)],
)
@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_sizes_of_zero(batch, len_q, len_kv, heads_q, heads_kv, mask):
    q, k, v = random_qkv(batch, len_q, len_kv, heads_q, heads_kv, 4, 5)
    out, lse = reference(q, k, v, mask=mask, return_lse=True)
    assert out.shape == (batch, len_q, heads_q, 5)
    assert lse.shape == (batch, heads_q, len_q)
    if len_kv == 0:
        assert (out == 0).all()
        assert (lse == -math.inf).all()


def test_rows_that_see_nothing_have_no_gradient_and_no_nan():
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 5, 2, 2, dtype=torch.float64))
    out, lse = reference(q, k, v, mask=Causal(), return_lse=True)
    assert (out[:, :3] == 0).all()
    assert (lse[:, :, :3] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 3:]).all()
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, :, 3:].sum(), (q, k, v))
    assert (dq[:, :3] == 0).all()
    for grad in (dq, dk, dv):
        assert torch.isfinite(grad).all()
    assert (dq[:, 3:] != 0).any()


def test_gradients_are_right():
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 4, 3, 2, 1, 3, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: reference(*x, mask=Causal()), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_computes_in_the_dtype_asked_for(dtype):
    q, k, v = random_qkv(dtype=torch.bfloat16)
    out, lse = reference(q, k, v, dtype=dtype, return_lse=True)
    assert out.dtype == lse.dtype == dtype


def test_unknown_arguments_are_refused():
    q, k, v = random_qkv()
    with pytest.raises(InvalidInputError, match="layout='sbhd'"):
        reference(q, k, v, layout="sbhd")
    with pytest.raises(InvalidInputError, match="mask="):
        reference(q, k, v, mask=None)

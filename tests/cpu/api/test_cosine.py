"""Tests cosine attention on the CPU path: results, fixed shift, arguments."""

from __future__ import annotations

import math

import pytest
import torch

import jitattn
from jitattn import L2Norm
from jitattn.request.norm import shift_of
from jitattn.values.sequences import Paged
from tests.support.inputs import random_qkv


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 10.0, 100.0])
def test_against_the_reference(groups: int, scale: float | None) -> None:
    q, k, v = random_qkv(2, 20, 30, 4, 2, 16)
    norm = jitattn.L2Norm(groups, torch.rand(4) + 0.5)
    out = jitattn.attention(q, k, v, qk_norm=norm, scale=scale, mask=jitattn.Causal())
    truth = jitattn.reference.reference(q, k, v, qk_norm=norm, scale=scale, mask=jitattn.Causal())
    # Scores are rounded in proportion to the largest, up to 1.5 * scale * groups.
    bound = 1e-6 + 3e-7 * (scale or 8.0) * groups
    torch.testing.assert_close(out, truth.float(), rtol=bound, atol=bound)


def test_inside_is_outside() -> None:
    q, k, v = random_qkv(1, 20, 30, 2, 2, 16)
    inside = jitattn.attention(q, k, v, qk_norm=jitattn.L2Norm(2))
    units = jitattn.l2norm(q, 2), jitattn.l2norm(k, 2)
    outside = jitattn.attention(*units, v, qk_norm=jitattn.L2Norm(2, normalize=False))
    torch.testing.assert_close(inside, outside)
    torch.testing.assert_close(inside, jitattn.attention(*units, v, scale=8.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_vectors_stay_zero(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 1, 8, dtype=dtype)
    assert torch.equal(jitattn.l2norm(x), x)
    x = x.requires_grad_()
    jitattn.l2norm(x).sum().backward()
    assert x.grad.isfinite().all()
    out = jitattn.attention(x.detach(), x.detach(), x.detach() + 1, qk_norm=jitattn.L2Norm())
    assert torch.equal(out, torch.ones_like(x))


def test_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 9, 12, 2, 1, 8))
    scale = torch.rand(2, requires_grad=True)
    norm = jitattn.L2Norm(2, scale)
    grads = []
    for function in (jitattn.attention, jitattn.reference.reference):
        out = function(q, k, v, qk_norm=norm)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v, scale)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_bound_that_is_known_stands_for_the_maximum() -> None:
    fp16, bf16 = torch.float16, torch.bfloat16
    assert shift_of(jitattn.L2Norm(), 8.0, fp16) == 0.0
    assert shift_of(jitattn.L2Norm(), 10.0, fp16) == pytest.approx(14 - 10 * math.log2(math.e))
    assert shift_of(jitattn.L2Norm(), 11.0, fp16) is None
    assert shift_of(jitattn.L2Norm(2), 8.0, fp16) is None
    assert shift_of(jitattn.L2Norm(4), 10.0, bf16) == 0.0
    assert shift_of(jitattn.L2Norm(), 50.0, bf16) is None
    learned = torch.ones(4)
    assert shift_of(jitattn.L2Norm(1, learned), 1.0, bf16) is None
    assert shift_of(jitattn.L2Norm(1, learned, bound=10.0), 1.0, bf16) == 0.0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jitattn.L2Norm(0), "groups=0"),
        (lambda: jitattn.L2Norm(bound=-1.0), "bound=-1.0"),
        (lambda: jitattn.L2Norm(bound=0.1), "it bounds head_scale, and there is none"),
        (lambda: jitattn.L2Norm(1, torch.ones(2), normalize=False), "multiply q by it"),
    ],
)
def test_norms_are_checked(make: object, text: str) -> None:
    with pytest.raises(jitattn.InvalidInputError, match=text):
        make()


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        (jitattn.L2Norm(3), "must divide head_dim, which is 16"),
        (
            jitattn.L2Norm(1, torch.ones(3)),
            r"head_scale\) is .*\[3\]: it must be \[2\]",
        ),
        (5, "qk_norm is a int"),
    ],
)
def test_calls_are_checked(norm: object, text: str) -> None:
    q, k, v = random_qkv(1, 3, 3, 2, 1, 16)
    with pytest.raises(jitattn.InvalidInputError, match=text):
        jitattn.attention(q, k, v, qk_norm=norm)


def test_pages_are_normalised_when_they_are_stored() -> None:
    q, k, v = random_qkv(1, 3, 16, 2, 1, 16)
    pages = Paged(torch.zeros(1, 1, dtype=torch.int32), torch.tensor([16], dtype=torch.int32))
    with pytest.raises(jitattn.UnsupportedError, match="normalize=False"):
        jitattn.attention(q, k, v, kv_seqs=pages, qk_norm=jitattn.L2Norm())
    units = jitattn.l2norm(q), jitattn.l2norm(k)
    norm = jitattn.L2Norm(normalize=False)
    out = jitattn.attention(*units, v, kv_seqs=pages, qk_norm=norm)
    torch.testing.assert_close(out, jitattn.attention(q, k, v, qk_norm=jitattn.L2Norm()))


def test_a_norm_that_is_refused() -> None:
    q = torch.randn(1, 3, 2, 8)
    for norm, match in (
        (L2Norm(3), "must divide head_dim, which is 8"),
        (L2Norm(1, torch.ones(3)), "L2Norm"),
        ("cosine", "qk_norm is a str"),
    ):
        for scale in (None, 2.0):
            with pytest.raises(jitattn.InvalidInputError, match=match):
                jitattn.attention(q, q, q, qk_norm=norm, scale=scale)

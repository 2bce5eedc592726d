"""Tests that autocast has no effect on forward, backward and helper functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import Causal, L2Norm, Ragged, Rotary
from jitattn.compat.fast_ops.flash_attention.attention_ref import attention_ref
from jitattn.compat.flash_cosine_sim_attention import plain_cosine_sim_attention
from jitattn.compat.warp_attention.baseline_tester import attn
from jitattn.reference import reference
from jitattn.values.autocast import matmul
from tests.support.compare import rel_l2
from tests.support.inputs import random_qkv


def leaves(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(dtype).requires_grad_() for x in random_qkv(1, length, length, 2, 1, 32)]


@pytest.mark.parametrize("length", [60, 200], ids=["one_chunk", "checkpoints"])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"qk_norm": L2Norm()}], ids=str)
def test_the_cpu_path_keeps_its_promise(length: int, more: dict[str, Any]) -> None:
    own, wide = leaves(length), leaves(length, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = jitattn.attention(*own, mask=Causal(), return_lse=True, **more)
        (out.sin().sum() + lse.sum()).backward()  # discouraged, and done all the same
    truth, lse_truth = reference(*wide, mask=Causal(), return_lse=True, **more)
    (truth.sin().sum() + lse_truth.sum()).backward()
    assert out.dtype == torch.float32
    assert rel_l2(out, truth) < 2e-6
    assert rel_l2(lse, lse_truth) < 2e-6
    for x, y in zip(own, wide, strict=True):
        assert rel_l2(x.grad, y.grad) < 5e-6


def everything() -> dict[str, Callable[[], Any]]:
    q, k, v = random_qkv(1, 9, 9, 2, 2, 16)
    lse = q[..., 0].transpose(1, 2)
    tables = torch.arange(144.0).view(2, 9, 8).cos().unbind()
    seqs = Ragged(torch.tensor([0, 4]), torch.tensor([4, 5]))
    flat = [x[0] for x in (q, k, v)]
    return {
        "reference": lambda: reference(q, k, v, dtype=torch.float32, return_lse=True),
        "sequences": lambda: jitattn.attention(*flat, q_seqs=seqs, kv_seqs=seqs, return_lse=True),
        "merge": lambda: jitattn.merge([q, k], [lse, lse]),
        "l2norm": lambda: [jitattn.l2norm(q)],
        "fast_ops": lambda: attention_ref(q, k, v),
        "warp_attention": lambda: [attn(q, k, v)],
        "cosine": lambda: [plain_cosine_sim_attention(q, k, v)],
        "cache": lambda: jitattn.attention_with_kvcache(
            q[:, :2],
            k.clone(),
            v.clone(),
            k[:, :2],
            v[:, :2],
            length=5,
            rotary=Rotary(*tables, interleaved=True),
            return_lse=True,
        ),
    }


@pytest.mark.parametrize("name", everything())
def test_results_are_the_same_bits(name: str) -> None:
    wanted = everything()[name]()
    with torch.autocast("cpu", torch.bfloat16):
        found = everything()[name]()
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_operators_too() -> None:
    q, k, v = leaves(40)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = jitattn.attention(q, k, v, mask=Causal())
            return result

    torch._dynamo.reset()
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
    wanted = jitattn.attention(q, k, v, mask=Causal())
    assert torch.equal(out, wanted)
    for one, other in zip(
        torch.autograd.grad(out.sum(), (q, k, v)),
        torch.autograd.grad(wanted.sum(), (q, k, v)),
        strict=True,
    ):
        assert rel_l2(one, other) < 1e-6


@pytest.mark.parametrize("lead", [((2, 3), (2, 3)), ((2, 3), (2, 1)), ((3,), (2, 1))])
def test_products_have_every_derivative(lead: tuple[tuple[int, ...], ...]) -> None:
    a = torch.randn(*lead[0], 4, 5, dtype=torch.float64)
    b = torch.randn(*lead[1], 5, 2, dtype=torch.float64)
    own = (a.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(matmul, own, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(matmul, own)
    assert torch.equal(matmul(a, b), a @ b)

"""Tests that autocast casts the inputs of attention, and has no effect on what is inside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import Causal, L2Norm, Rotary
from jitattn.compat.fast_ops.flash_attention.attention_ref import attention_ref
from jitattn.compat.flash_attn import flash_attn_func
from jitattn.compat.flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    plain_cosine_sim_attention,
)
from jitattn.compat.warp_attention.baseline_tester import attn
from jitattn.reference import reference
from jitattn.values.autocast import matmul
from tests.support.compare import rel_l2
from tests.support.inputs import random_qkv


def leaves(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(dtype).requires_grad_() for x in random_qkv(1, length, length, 2, 1, 32)]


@pytest.mark.parametrize("length", [60, 200], ids=["one_chunk", "checkpoints"])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"qk_norm": L2Norm()}], ids=str)
def test_inputs_are_cast_and_nothing_else(length: int, more: dict[str, Any]) -> None:
    """The results are those of bf16 inputs, to the bit; gradients come in the inputs' dtypes."""
    own, cast = leaves(length), leaves(length)
    own[1] = own[1].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = jitattn.attention(*own, mask=Causal(), return_lse=True, **more)
        (out.float().sin().sum() + lse.sum()).backward()  # discouraged, and done all the same
    qkv = [x.to(torch.bfloat16) for x in cast]
    expected, lse_expected = jitattn.attention(*qkv, mask=Causal(), return_lse=True, **more)
    (expected.float().sin().sum() + lse_expected.sum()).backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(lse, lse_expected)
    for x, y in zip(own, cast, strict=True):
        assert x.grad.dtype == x.dtype
        assert torch.equal(x.grad, y.grad.to(x.dtype))


@pytest.mark.parametrize("length", [60, 200], ids=["one_chunk", "checkpoints"])
def test_fp64_keeps_its_promise(length: int) -> None:
    own, wide = leaves(length, torch.float64), leaves(length, torch.float64)
    bias = torch.randn(1, 1, length, length)  # fp32 beside fp64, and stays so
    with torch.autocast("cpu", torch.bfloat16):
        out = jitattn.attention(*own, mask=Causal(), bias=bias)
        out.sin().sum().backward()
    truth = reference(*wide, mask=Causal(), bias=bias.double())
    truth.sin().sum().backward()
    assert out.dtype == torch.float64
    assert rel_l2(out, truth) < 1e-12
    for x, y in zip(own, wide, strict=True):
        assert rel_l2(x.grad, y.grad) < 1e-12


def test_a_bias_is_cast_too() -> None:
    q, k, v = random_qkv(1, 9, 9, 2, 2, 16)
    bias = torch.randn(1, 1, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        out = jitattn.attention(q, k, v, bias=bias)
    expected = jitattn.attention(q.half(), k.half(), v.half(), bias=bias.half())
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


def test_autocast_of_another_device_or_disabled_changes_nothing() -> None:
    qkv = random_qkv(1, 9, 9, 2, 2, 16)
    expected = jitattn.attention(*qkv)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(jitattn.attention(*qkv), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be no CUDA
        context = torch.autocast("cuda", torch.bfloat16)
    with context:
        assert torch.equal(jitattn.attention(*qkv), expected)


def test_compiled_calls_are_cast() -> None:
    q, k, v = random_qkv(1, 9, 9, 2, 2, 16)
    compiled = torch.compile(jitattn.attention, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(q, k.bfloat16(), v)
        assert torch.equal(out, jitattn.attention(q, k, v))
    assert out.dtype == torch.bfloat16


def everything() -> dict[str, Callable[[], Any]]:
    q, k, v = random_qkv(1, 9, 9, 2, 2, 16)
    lse = q[..., 0].transpose(1, 2)
    tables = torch.arange(144.0).view(2, 9, 8).cos().unbind()
    return {
        "reference": lambda: reference(q, k, v, dtype=torch.float32, return_lse=True),
        "flash_attn": lambda: [flash_attn_func(q, k, v)],
        "a cosine door": lambda: [flash_cosine_sim_attention(q, k, v)],
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
    wanted = function(q, k, v)
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

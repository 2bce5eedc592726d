"""Tests transformed or traced calls on the CPU: torch.func, make_fx, jit.trace, compile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import jitattn
from jitattn import Causal, Ragged
from jitattn.reference import reference
from tests.support.inputs import random_qkv


def loss(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    return jitattn.attention(q, k, v, mask=Causal(), **more).sin().sum()


def true_loss(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    return reference(q, k, v, mask=Causal(), dtype=torch.float32, **more).sin().sum()


def assert_close(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [128, 129, 300])
def test_grad_at_every_length(length: int) -> None:
    own = random_qkv(1, length, length, 2, 1, 8)
    every = (0, 1, 2)
    assert_close(grad(loss, argnums=every)(*own), grad(true_loss, argnums=every)(*own))
    samples = [x[None].repeat(2, 1, 1, 1, 1) for x in own]
    found = vmap(grad(loss, argnums=every))(*samples)
    assert_close([x[1] for x in found], grad(true_loss, argnums=every)(*own))


def test_where_hooks_of_saved_tensors_are_off() -> None:
    own = [x.requires_grad_() for x in random_qkv(1, 200, 200, 1, 1, 8)]
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        gradients = torch.autograd.grad(loss(*own), own)
    assert_close(gradients, torch.autograd.grad(true_loss(*own), own))


def test_all_transforms() -> None:
    q, k, v = random_qkv(1, 4, 5, 2, 1, 3, 2)
    own = (k, v)
    for function in (
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacfwd(jacfwd(f)),
        lambda f: lambda q: jvp(grad(f), (q,), (q.cos(),))[1],
    ):
        found = function(lambda q: loss(q, *own))(q)
        wanted = function(lambda q: true_loss(q, *own))(q)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_cosine_attention_and_merge() -> None:
    q, k, v = random_qkv(1, 4, 5, 2, 1, 3, 2)
    norm = jitattn.L2Norm()
    found = grad(lambda q: loss(q, k, v, qk_norm=norm))(q)
    assert_close([found], [grad(lambda q: true_loss(q, k, v, qk_norm=norm))(q)])

    def merged(q: Tensor) -> Tensor:
        halves = [
            jitattn.attention(q, k[:, part], v[:, part], return_lse=True)
            for part in (slice(0, 2), slice(2, 5))
        ]
        result: Tensor = jitattn.merge(*zip(*halves, strict=True))[0]
        return result

    def whole(q: Tensor) -> Tensor:
        result: Tensor = reference(q, k, v, dtype=torch.float32)
        return result

    assert_close([jacrev(merged)(q), jacfwd(merged)(q)], [jacrev(whole)(q)] * 2)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    own = random_qkv(1, 5, 7, 2)
    graph = make_fx(lambda q, k, v: loss(q, k, v), tracing_mode=mode)(*own)
    others = random_qkv(1, 5, 7, 2)
    torch.testing.assert_close(graph(*others), loss(*others))
    if mode == "symbolic":
        longer = random_qkv(1, 140, 150, 2)
        torch.testing.assert_close(graph(*longer), loss(*longer))


def test_make_fx_of_a_gradient() -> None:
    own = random_qkv(1, 5, 7, 2)
    graph = make_fx(lambda q, k, v: grad(loss)(q, k, v), tracing_mode="symbolic")(*own)
    longer = random_qkv(1, 140, 150, 2)
    torch.testing.assert_close(graph(*longer), grad(loss)(*longer))


def test_make_fx_of_a_cache() -> None:
    def function(q: Tensor, cache: Tensor, new: Tensor, length: Tensor) -> Tensor:
        result: Tensor = jitattn.attention_with_kvcache(
            q, cache, cache.clone(), new, new, length=length
        )
        return result + cache.sum()

    def given(length: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(length)
        q, cache = (torch.randn(1, n, 2, 8, generator=generator) for n in (2, length))
        return [q, cache, q + 1.0, torch.tensor([3])]

    graph = make_fx(function, tracing_mode="symbolic")(*given(9))
    torch.testing.assert_close(graph(*given(20)), function(*given(20)))


def test_jit_trace_holds_for_other_lengths() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(loss, random_qkv(1, 5, 7, 2))
    longer = random_qkv(2, 140, 150, 2)
    torch.testing.assert_close(traced(*longer), loss(*longer))


@pytest.mark.parametrize("strict", [True, False])
def test_export_for_any_length(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result: Tensor = jitattn.attention(q, k, v, mask=Causal(), softcap=2.0)
            return result

    lengths = [torch.export.Dim(name, min=2, max=500) for name in ("len_q", "len_kv", "len_kv")]
    shapes = tuple({1: length} for length in (lengths[0], lengths[1], lengths[1]))
    exported = torch.export.export(
        Model(), tuple(random_qkv(1, 5, 7, 2)), dynamic_shapes=shapes, strict=strict
    )
    longer = random_qkv(1, 140, 150, 2)
    torch.testing.assert_close(exported.module()(*longer), Model()(*longer))


def test_transforms_inside_of_what_is_compiled_are_refused() -> None:
    q, k, v = random_qkv(1, 5, 7, 2)

    def dual(q: Tensor) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(q, q), k, v)).tangent

    functions = (
        grad(lambda q: loss(q, k, v)),
        vmap(lambda q: loss(q[None], k, v)),
        lambda q: jvp(lambda q: loss(q, k, v), (q,), (q,))[1],
        dual,
    )
    for function in functions:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"transform of torch\.func .* not compiled"):
            torch.compile(function, backend="eager", fullgraph=True)(q)


def test_merge_and_l2norm_in_one_graph() -> None:
    q, k, v = random_qkv(1, 5, 8, 2)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        unit = jitattn.l2norm(q)
        parts = [
            jitattn.attention(unit, k[:, part], v[:, part], return_lse=True)
            for part in (slice(0, 3), slice(3, 8))
        ]
        return jitattn.merge(*zip(*parts, strict=True))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v), function(q, k, v))


def test_sequences_in_a_gradient() -> None:
    flat = torch.randn(9, 2, 4)
    seqs = Ragged.from_cu_seqlens(torch.tensor([0, 4, 9]))

    def function(x: Tensor, compute: Any) -> Tensor:
        out: Tensor = compute(x, x, x, q_seqs=seqs, kv_seqs=seqs)
        return out.float().sin().sum()

    found, wanted = (grad(function)(flat, f) for f in (jitattn.attention, reference))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

"""Tests transformed or traced calls on a GPU: torch.func, make_fx, jit.trace, dispatch modes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import jitattn
from jitattn import Causal, KeyPadding, L2Norm, Ragged
from tests.support.compare import rel_l2
from tests.support.inputs import drawn
from tests.support.operators import Operators

B, L, H, D = 2, 20, 2, 16

pytestmark = pytest.mark.usefixtures("with_grad")


def made(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float16) -> Tensor:
    return drawn(*shape, seed=seed, dtype=dtype).cuda()


def inputs() -> list[Tensor]:
    return [made(B, L, H, D, seed=seed) for seed in range(3)]


def loss(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    out, lse = jitattn.attention(q, k, v, mask=Causal(), return_lse=True, **more)
    return (out.float().sin().sum() + lse.cos().sum()) / 8


def true_gradients(function: Callable[..., Tensor], *own: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in own]
    return torch.autograd.grad(function(*leaves), leaves)


def assert_same(found: Any, wanted: Any, limit: float = 1e-3) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert rel_l2(one, other) <= limit


def test_grad() -> None:
    q, k, v = inputs()
    assert_same(grad(loss, argnums=(0, 1, 2))(q, k, v), true_gradients(loss, q, k, v))
    gradient, value = grad_and_value(lambda k: loss(q, k, v))(k)
    assert_same([gradient, value], [true_gradients(loss, q, k, v)[1], loss(q, k, v)])


def test_grad_of_what_is_added_to_scores() -> None:
    q, k, v = inputs()
    tables = [made(H, seed=5), made(H, 9, seed=6), made(1, H, 1, L, seed=7), made(H, seed=8)]

    def function(slopes: Tensor, relative: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        more = {"alibi_slopes": slopes, "relative_bias": relative, "bias": bias, "sinks": sinks}
        return loss(q, k, v, **more)

    found = grad(function, argnums=(0, 1, 2, 3))(*tables)
    assert_same(found, true_gradients(function, *tables))


def test_constants_inside_of_a_transform() -> None:
    """Calls whose tensors belong to no transform, as those of a frozen part of a model."""
    q, k, v = inputs()
    x = torch.ones((), device="cuda")
    angle = torch.arange(L, device="cuda")[:, None] * torch.ones(D // 2, device="cuda") / 8
    rotary = jitattn.Rotary(angle.cos(), angle.sin(), interleaved=False)
    length = torch.full((B,), L, dtype=torch.int32, device="cuda")
    one_row = q[:, :1].contiguous()  # inside, the result of any operation is the transform's

    def computed() -> list[Tensor]:
        out, lse = jitattn.attention(q, k, v, mask=Causal(), return_lse=True)
        other = jitattn.attention_with_kvcache(one_row, k, v, length=length)
        merged, _ = jitattn.merge([out, out], [lse, lse])
        return [out, lse, other, merged, jitattn.apply_rotary(q, rotary)]

    wanted = computed()

    def scaled(x: Tensor) -> Tensor:
        return sum((one.float().sum() for one in computed()), torch.zeros((), device="cuda")) * x

    gradient = grad(scaled)(x)
    assert rel_l2(gradient, sum(one.float().sum() for one in wanted)) < 1e-3
    assert_same(vmap(lambda x: tuple(x * one for one in computed()))(x[None]),
                [one[None] for one in wanted])  # fmt: skip


def test_vjp_and_jacrev() -> None:
    q, k, v = (x[:1, :2, :1] for x in inputs())
    out, pull = vjp(lambda q: jitattn.attention(q, k, v), q)
    leaf = q.detach().requires_grad_()
    wanted = jitattn.attention(leaf, k, v)
    assert torch.equal(out, wanted)
    rows = [
        torch.autograd.grad(wanted.flatten()[idx], leaf, retain_graph=True)[0]
        for idx in range(wanted.numel())
    ]
    assert_same(
        pull(torch.ones_like(out)), torch.autograd.grad(wanted.sum(), leaf, retain_graph=True)
    )
    jacobian = jacrev(lambda q: jitattn.attention(q, k, v))(q)
    assert rel_l2(jacobian.flatten(0, 3), torch.stack(rows)) < 1e-3


@pytest.mark.parametrize("dims", [(0, 0, 0), (2, None, 1), (None, None, 0)])
def test_vmap(dims: tuple[int | None, ...]) -> None:
    own = []
    for seed, dim in enumerate(dims):
        shape = [B, L, H, D]
        if dim is not None:
            shape.insert(dim, 3)
        own.append(made(*shape, seed=seed))
    found = vmap(jitattn.attention, in_dims=dims)(*own)
    rows = [
        jitattn.attention(
            *(x if dim is None else x.select(dim, idx) for x, dim in zip(own, dims, strict=True))
        )
        for idx in range(3)
    ]
    assert_same(found, rows)
    found = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=dims)(*own)
    rows = [
        true_gradients(
            loss,
            *(x if dim is None else x.select(dim, idx) for x, dim in zip(own, dims, strict=True)),
        )
        for idx in range(3)
    ]
    assert_same(found, [torch.stack(parts) for parts in zip(*rows, strict=True)])


def test_vmap_over_masks_and_sequences() -> None:
    q, k, v = inputs()
    keep = torch.rand(3, B, L, generator=torch.Generator().manual_seed(2)).cuda() > 0.4

    def masked(keep: Tensor) -> Tensor:
        result: Tensor = jitattn.attention(q, k, v, mask=KeyPadding(keep))
        return result

    assert_same(vmap(masked)(keep), [masked(one) for one in keep])
    flat = made(3, 12, H, D)
    seqs = Ragged.from_cu_seqlens(torch.tensor([0, 5, 12], dtype=torch.int32).cuda(), 7)

    def ragged(x: Tensor) -> Tensor:
        result: Tensor = jitattn.attention(x, x, x, q_seqs=seqs, kv_seqs=seqs)
        return result

    assert_same(vmap(ragged)(flat), [ragged(one) for one in flat])


def test_vmap_over_dropout() -> None:
    q, k, v = inputs()
    samples = torch.stack([q, q, q])

    def dropped(q: Tensor) -> Tensor:
        result: Tensor = jitattn.attention(q, k, v, dropout_p=0.5)
        return result

    same = vmap(dropped, randomness="same")(samples)
    assert torch.equal(same[0], same[1])
    other = vmap(dropped, randomness="different")(samples)
    assert not torch.equal(other[0], other[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(dropped)(samples)


def test_gradients_of_each_sample() -> None:
    """As training with differential privacy has them."""
    model = torch.nn.Linear(D, 3 * H * D, dtype=torch.float16).cuda()
    weights = {name: x.detach() for name, x in model.named_parameters()}
    samples = made(3, L, D, seed=4)

    def one(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        qkv = functional_call(model, weights, (sample[None],)).unflatten(-1, (3, H, D))
        return loss(*qkv.unbind(2))

    found = vmap(grad(one), in_dims=(None, 0))(weights, samples)
    for idx, sample in enumerate(samples):
        wanted = grad(one)(weights, sample)
        assert_same([x[idx] for x in found.values()], wanted.values(), 2e-3)


def test_cosine_attention_and_merge() -> None:
    q, k, v = inputs()
    scale = made(H, seed=9)

    def function(q: Tensor, scale: Tensor) -> Tensor:
        return loss(q, k, v, qk_norm=L2Norm(head_scale=scale))

    assert_same(grad(function, argnums=(0, 1))(q, scale), true_gradients(function, q, scale))

    def merged(q: Tensor) -> Tensor:
        halves = [
            jitattn.attention(q, k[:, part], v[:, part], return_lse=True)
            for part in (slice(0, 7), slice(7, L))
        ]
        outs, lses = zip(*halves, strict=True)
        out, lse = jitattn.merge(outs, lses)
        return out.float().sin().sum() + lse.sum()

    assert_same([grad(merged)(q)], true_gradients(merged, q), 2e-3)


def test_what_has_no_kernel_is_refused() -> None:
    q, k, v = inputs()
    refused = pytest.raises(jitattn.UnsupportedError, match="move the tensors to the CPU")
    with refused:
        jvp(lambda q: jitattn.attention(q, k, v), (q,), (q,))
    with refused:
        torch.func.jacfwd(lambda q: jitattn.attention(q, k, v))(q)
    with refused:
        grad(lambda q: grad(loss)(q, k, v).sum())(q)
    with refused:
        torch.func.hessian(loss)(q, k, v)
    for inner in (
        lambda q: jitattn.attention(q, k, v),
        lambda q: jitattn.attention(q, k, v, qk_norm=L2Norm()),
        lambda q: jitattn.attention(k, k, v, bias=q[:, :1, :1, :1].expand(B, H, 1, L).contiguous()),
        lambda q: jitattn.attention_with_kvcache(q, k.clone(), v.clone(), length=3),
    ):
        with torch.no_grad(), forward_ad.dual_level(), refused:
            inner(forward_ad.make_dual(q, torch.ones_like(q)))
    with pytest.raises(jitattn.UnsupportedError, match=r"leave it out"):
        vmap(lambda q: jitattn.attention(q, k, v, out=torch.empty_like(k)))(q[None])
    with pytest.raises(jitattn.UnsupportedError, match=r"call it outside, or use attention"):
        vmap(lambda q: jitattn.attention_with_kvcache(q, k, v, length=3))(q[None])


def test_nothing_but_a_warm_call_is_plain() -> None:
    """A transform that is over leaves nothing behind."""
    q, k, v = inputs()
    kept = []
    vmap(lambda q: kept.append(q) or jitattn.attention(q, k, v))(q[None])
    assert torch.equal(jitattn.attention(q, k, v), jitattn.attention(q, k, v))


def test_a_dispatch_mode_sees_operators() -> None:
    q, k, v = inputs()
    wanted = jitattn.attention(q, k, v, mask=Causal())
    out = torch.empty_like(wanted)
    with Operators() as operators:
        assert jitattn.attention(q, k, v, mask=Causal(), out=out) is out
        jitattn.attention_with_kvcache(q, k.clone(), v.clone(), length=3)
    ours = [one for one in operators.called if one.namespace == "jitattn"]
    assert [one.overloadpacket.__name__ for one in ours] == ["attention", "attention_with_kvcache"]
    assert torch.equal(out, wanted)
    seqs = Ragged.from_cu_seqlens(torch.tensor([0, 5], dtype=torch.int32).cuda(), 5)
    flat = q.flatten(0, 1)
    with Operators(), pytest.raises(jitattn.UnsupportedError, match="leave out out"):
        jitattn.attention(flat, flat, flat, q_seqs=seqs, kv_seqs=seqs, out=torch.empty_like(flat))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    q, k, v = inputs()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return jitattn.attention(q, k, v, mask=Causal(), softcap=2.0) * 2

    graph = make_fx(function, tracing_mode=mode)(q, k, v)
    assert "jitattn.attention" in graph.code
    other = [x.flip(0) for x in (q, k, v)]
    assert torch.equal(graph(*other), function(*other))
    if mode == "symbolic":
        longer = [made(1, L + 9, H, D, seed=seed) for seed in range(3)]
        assert torch.equal(graph(*longer), function(*longer))


def test_jit_trace() -> None:
    q, k, v = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(
            lambda q, k, v: jitattn.attention(q, k, v, mask=Causal()), (q, k, v)
        )
    longer = [made(1, L + 9, H, D, seed=seed) for seed in range(3)]
    assert torch.equal(traced(*longer), jitattn.attention(*longer, mask=Causal()))

"""Tests the flash-cosine-sim-attention door against a dense fp64 reference of its documentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jitattn
from jitattn.compat.flash_cosine_sim_attention import (
    debug,
    flash_cosine_sim_attention,
    l2norm_tensors,
    plain_cosine_sim_attention,
)
from jitattn.compat.flash_cosine_sim_attention.benchmark import benchmark
from jitattn.compat.flash_cosine_sim_attention.transformer import (
    Attention,
    CosineSimCausalTransformer,
    FeedForward,
    non_cosine_sim_attn_fn,
)
from tests.support.compare import assert_same_gradients, rel_l2
from tests.support.compat_cosine import BIAS, CASES, LK, LQ, B, H, dense, tensors


@pytest.mark.parametrize("function", [flash_cosine_sim_attention, plain_cosine_sim_attention])
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(name: str, function: object) -> None:
    arguments, kind = CASES[name]
    own = tensors(**kind)
    out = function(*own, **arguments)  # type: ignore[operator]
    truth = dense(*own, **arguments)  # type: ignore[arg-type]
    assert out.shape == own[0].shape
    assert out.dtype is own[0].dtype
    assert rel_l2(out, truth) < 1e-5
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    assert_same_gradients([out], [truth], own, [d_out], 1e-4)


@pytest.mark.parametrize("by_distance", [False, True])
def test_the_gradient_of_a_bias(by_distance: bool) -> None:
    own = tensors()
    bias = (BIAS[0, :H, :21] if by_distance else BIAS[:H]).clone().requires_grad_()
    ends = [f(*own, attn_bias=bias) for f in (flash_cosine_sim_attention, dense)]
    got, wanted = (torch.autograd.grad(end.sum(), bias)[0] for end in ends)
    assert got.shape == bias.shape
    assert rel_l2(got, wanted) < 1e-4


def test_rows_that_see_nothing_and_vectors_of_zeros() -> None:
    q, k, v = (x.detach().half() for x in tensors())
    q[0, 0, 0] = 0.0
    out = flash_cosine_sim_attention(q, k, v, mask=torch.zeros(B, LK, dtype=torch.bool))
    assert not out.any()
    assert flash_cosine_sim_attention(q, k, v).isfinite().all()


class _Dtypes(TorchDispatchMode):
    """Notes the dtypes of floating-point results that have a row for each query and key."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.found = count, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() >= self.count:
                self.found.add(x.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_the_plain_function_computes_in_the_dtype_of_its_inputs(
    name: str, dtype: torch.dtype
) -> None:
    arguments, kind = CASES[name]
    if name == "large scale" and dtype is not torch.float32:
        arguments = {**arguments, "scale": 20.0}
    given = {
        key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in arguments.items()
    }
    own = tensors(**kind, dtype=dtype)
    with _Dtypes(B * H * LQ * LK) as seen:
        out = plain_cosine_sim_attention(*own, **given)
        out.sum().backward()
    assert seen.found == {dtype}
    limit = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert rel_l2(out, dense(*own, **given)) < limit


def test_the_plain_function_gives_zeros_where_nothing_is_seen() -> None:
    q, k, v = tensors()
    bias = BIAS[:H].clone()
    bias[1, 3] = float("-inf")
    mask = torch.ones(B, LK, dtype=torch.bool)
    mask[1] = False
    for given in ({"attn_bias": bias.requires_grad_()}, {"mask": mask}, {"causal": True}):
        own = (q, k[:, :, :20], v[:, :, :20]) if "causal" in given else (q, k, v)
        results = []
        for function in (plain_cosine_sim_attention, flash_cosine_sim_attention):
            out = function(*own, **given)
            leaves = [*own, *(x for x in given.values() if getattr(x, "requires_grad", False))]
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        empty = (results[1][0] == 0).all(dim=3)
        assert empty.any()
        assert torch.equal((results[0][0] == 0).all(dim=3), empty)
        for got, wanted in zip(*results, strict=True):
            assert rel_l2(got, wanted) < 1e-5
    assert not plain_cosine_sim_attention(q, k[:, :, :0], v[:, :, :0]).any()


def test_l2norm_tensors() -> None:
    x, y = torch.randn(3, 8), torch.randn(2, 8, dtype=torch.float64)
    found = l2norm_tensors(x, y, groups=2)
    assert len(found) == 2
    assert {one.dtype for one in found} == {torch.float32}
    lengths = found[0].unflatten(1, (2, 4)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(3, 2))
    assert debug() == ()


def test_wrong_shapes_are_named() -> None:
    q, k, v = tensors()
    with pytest.raises(jitattn.InvalidInputError, match=r"q has shape \[33, 32\]"):
        flash_cosine_sim_attention(q[0, 0], k, v)
    with pytest.raises(jitattn.InvalidInputError, match="attn_bias has shape"):
        flash_cosine_sim_attention(q, k, v, attn_bias=BIAS[:H][None])


@pytest.mark.parametrize("function", [flash_cosine_sim_attention, plain_cosine_sim_attention])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("groups", 3),
        ("scale", float("nan")),
        ("mask", torch.ones(B, LK)),
        ("mask", torch.ones(B, LK + 1, dtype=torch.bool)),
        ("attn_bias", BIAS[:H].half()),
        ("attn_bias", BIAS[0, :H, :20]),
    ],
)
def test_both_refuse_the_same(function: Any, name: str, value: object) -> None:
    with pytest.raises(jitattn.InvalidInputError):
        function(*tensors(), **{name: value})


def test_the_timer() -> None:
    q, k, v = tensors()
    timed = benchmark(flash_cosine_sim_attention, num_times=2, warmup_iters=1, backwards=True)
    assert timed(q, k, v, causal=True) > 0.0
    assert q.grad is not None


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize(
    "kind", [{}, {"use_cuda_kernel": True}, {"non_cosine_sim_attn": True}], ids=str
)
def test_the_transformer_learns_and_draws(pre_norm: bool, kind: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = CosineSimCausalTransformer(
        num_tokens=16,
        dim=32,
        max_seq_len=24,
        depth=2,
        heads=2,
        dim_head=16,
        attn_l2norm_groups=2,
        pre_norm=pre_norm,
        **kind,
    )
    text = (torch.arange(21) % 5).expand(4, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(text, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert model(text).shape == (4, 21, 16)
    drawn = model.generate(text[:, :6], 10)
    assert torch.equal(drawn, (torch.arange(6, 16) % 5).expand(4, -1))
    with pytest.raises(jitattn.InvalidInputError, match="max_seq_len=24"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_groups_reach_the_attention() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 9, 32)
    whole = Attention(32, dim_head=16, heads=2, use_cuda_kernel=True)
    parts = Attention(32, dim_head=16, heads=2, l2norm_groups=4, use_cuda_kernel=True)
    parts.load_state_dict(whole.state_dict())
    assert rel_l2(parts(x), whole(x)) > 1e-3
    oracle = Attention(32, dim_head=16, heads=2, l2norm_groups=4)
    oracle.load_state_dict(whole.state_dict())
    assert rel_l2(parts(x), oracle(x)) < 1e-5
    assert FeedForward(8, mult=2, pre_norm=True)(torch.randn(2, 8)).shape == (2, 8)
    q, k, v = (y.detach() for y in tensors())
    assert non_cosine_sim_attn_fn(q, k, v, scale=1).shape == q.shape
    with pytest.raises(jitattn.InvalidInputError, match="l2norm_groups=3"):
        Attention(32, dim_head=16, l2norm_groups=3)

"""Tests FlashAttention's extension module, operators, S_dmask and rotary embedding."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn.compat import flash_attn_2_cuda as extension
from jitattn.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from jitattn.compat.flash_attn._operators import NAMESPACE
from jitattn.compat.flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _get_block_size_n,
    _wrapped_flash_attn_forward,
)
from tests.support.compare import rel_l2
from tests.support.compat_flash_attn import HKV, D, H, dense, sequences
from tests.support.compat_flash_pages import cumulative

LENGTHS_Q, LENGTHS_KV = (7, 1, 0, 20), (30, 12, 9, 20)


def batch(len_q: int, len_kv: int, grad: bool = False) -> list[Tensor]:
    sizes = ((len_q, H), (len_kv, HKV), (len_kv, HKV))
    made = [torch.stack(sequences((n, n), heads, seed)) for seed, (n, heads) in enumerate(sizes)]
    return [x.requires_grad_(grad) for x in made]


def drawn(seed: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Random arguments: for `dense`, and as the extension takes them after the scale."""
    chance = random.Random(seed)
    causal = chance.random() < 0.5
    window = (chance.choice((-1, 0, 3, 9)), chance.choice((-1, 0, 4)))
    softcap = chance.choice((0.0, 2.0))
    keep_first, force = chance.choice((0, 3)), chance.random() < 0.5
    ours = {
        "scale": chance.choice((0.3, D**-0.5)),
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "keep_first": keep_first,
        "force": force,
    }
    return ours, (causal, *window, softcap, keep_first, force)


@pytest.mark.parametrize("seed", range(12))
def test_fwd_and_bwd(seed: int) -> None:
    len_q, len_kv = random.Random(seed).choice(((20, 20), (1, 30), (30, 5)))
    q, k, v = batch(len_q, len_kv, grad=True)
    ours, tail = drawn(seed)
    out, lse, dmask, state = extension.fwd(
        q, k, v, None, None, 0.0, ours["scale"], *tail, False, None
    )
    truths = [dense(*one, **ours) for one in zip(q, k, v, strict=True)]
    truth = torch.stack([one[0] for one in truths])
    assert rel_l2(out, truth) < 1e-5
    torch.testing.assert_close(lse, torch.stack([one[1] for one in truths]).float())
    assert dmask.numel() == 0
    assert state.shape == (2,)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    wanted = torch.autograd.grad(truth, (q, k, v), d_out.double())
    room = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    results = extension.bwd(
        d_out, q, k, v, out, lse, *room, None, 0.0, ours["scale"], *tail, False, None, None
    )
    for one, other, given in zip(results[:3], wanted, room, strict=True):
        assert one is given
        assert rel_l2(one, other) < 1e-4 or (one - other).abs().max() < 1e-6
    sums = (d_out * out).sum(-1).transpose(1, 2)
    assert results[3].shape == (2, H, 128)
    torch.testing.assert_close(results[3][..., :len_q], sums)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["plain", "used", "left", "paged"])
def test_varlen_fwd_and_bwd(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    ours, tail = drawn(seed)
    queries = sequences(LENGTHS_Q, H, 0)
    keys, values = (sequences(LENGTHS_KV, HKV, s) for s in (1, 2))
    q, k, v = (torch.cat(x).requires_grad_() for x in (queries, keys, values))
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_KV)
    used = left = table = None
    parts = [slice(0, n) for n in LENGTHS_KV]
    if kind in ("used", "left"):
        used = torch.tensor([max(1, n - 3) for n in LENGTHS_KV], dtype=torch.int32)
        parts = [slice(0, int(n)) for n in used]
    if kind == "left":
        left = torch.tensor([2, 0, 1, 4], dtype=torch.int32)
        parts = [slice(int(a), p.stop) for a, p in zip(left, parts, strict=True)]
    if kind == "paged":
        page, pages = 4, 32
        where = chance.sample(range(pages), pages)
        table = torch.tensor(where, dtype=torch.int32).view(4, 8)
        k, v = (torch.full((pages, page, HKV, D), float("nan")) for _ in range(2))
        for b, (own_k, own_v) in enumerate(zip(keys, values, strict=True)):
            for t in range(len(own_k)):
                k[table[b, t // page], t % page] = own_k[t]
                v[table[b, t // page], t % page] = own_v[t]
        used, cu_k = torch.tensor(LENGTHS_KV, dtype=torch.int32), torch.zeros_like(cu_q)
    given = (cu_q, cu_k, used, left, table, None, 20, 30, 0.0, ours["scale"], False)
    out, lse, _, _ = extension.varlen_fwd(q, k, v, None, *given, *tail, False, None)
    if kind == "paged":
        own = [torch.split(q, LENGTHS_Q), keys, values]
    else:
        split = [torch.split(x, LENGTHS_KV) for x in (k, v)]
        own = [torch.split(q, LENGTHS_Q)]
        own += [[x[p] for x, p in zip(side, parts, strict=True)] for side in split]
    truths = [dense(*one, **ours) for one in zip(*own, strict=True)]
    truth = torch.cat([one[0] for one in truths])
    assert rel_l2(out, truth) < 1e-5
    torch.testing.assert_close(lse, torch.cat([one[1] for one in truths], 1).float())
    if kind != "plain":
        return
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    wanted = torch.autograd.grad(truth, (q, k, v), d_out.double())
    results = extension.varlen_bwd(
        d_out, q, k, v, out, lse, None, None, None, cu_q, cu_k, None, 20, 30, 0.0, ours["scale"],
        False, *tail, False, None, None,
    )  # fmt: skip
    for one, other in zip(results[:3], wanted, strict=True):
        assert rel_l2(one, other) < 1e-4
    assert results[3].shape == (H, sum(LENGTHS_Q) + 4 * 128)
    sums = (d_out * out).sum(-1).T
    for b, begin in enumerate(cu_q[:-1].tolist()):
        column = begin + 128 * b
        wanted_of = sums[:, begin : begin + LENGTHS_Q[b]]
        torch.testing.assert_close(results[3][:, column : column + LENGTHS_Q[b]], wanted_of)


def test_zero_tensors_clears_a_given_out() -> None:
    q, k = torch.cat(sequences((5, 5), H, 0)), torch.cat(sequences((5, 5), HKV, 1))
    cu = torch.tensor([0, 5], dtype=torch.int32)
    for zero_tensors, rest in ((False, 7.0), (True, 0.0)):
        out = torch.full_like(q, 7.0)
        found = extension.varlen_fwd(
            q, k, k, out, cu, cu, None, None, None, None, 5, 5, 0.0, 0.25, zero_tensors, True, -1,
            -1, 0.0, 0, False, False, None,
        )  # fmt: skip
        assert found[0] is out
        assert (out[5:] == rest).all()
        assert not (out[:5] == 7.0).any()


def test_fwd_kvcache_writes_where_it_is_told() -> None:
    q, new_k, new_v = batch(2, 2)
    caches = [torch.stack(sequences((16, 16), HKV, seed)) for seed in (8, 9)]
    used, out = torch.tensor([5, 11], dtype=torch.int32), torch.empty_like(q)
    found, lse = extension.fwd_kvcache(
        q, *caches, new_k, new_v, used, None, None, None, None, None, None, out, D**-0.5, True, -1,
        -1, 0.0, 0, False, False, 0,
    )  # fmt: skip
    assert found is out
    for b in range(2):
        stop = int(used[b]) + 2
        truth, true_lse = dense(q[b], caches[0][b, :stop], caches[1][b, :stop], causal=True)
        assert rel_l2(out[b], truth) < 1e-5
        torch.testing.assert_close(lse[b], true_lse.float())
        assert torch.equal(caches[0][b, stop - 2 : stop], new_k[b])


@pytest.mark.parametrize("is_varlen", [False, True])
def test_s_dmask_says_what_was_dropped(is_varlen: bool) -> None:
    p, window = 0.3, (90, 0)
    q, k, v = batch(150, 200)
    given: dict[str, Any] = {"causal": True, "window_size": window, "return_attn_probs": True}
    if is_varlen:
        lengths = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (150, 200)]
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        out, lse, dmask = flash_attn_varlen_func(*flat, *lengths, 150, 200, p, **given)
        out, lse = out.view_as(q), lse.unflatten(1, (2, 150)).transpose(0, 1)
    else:
        out, lse, dmask = flash_attn_func(q, k, v, p, **given)
    assert dmask.shape == (2, H, 256, 256)
    assert not dmask[:, :, 150:].any()
    assert not dmask[..., 200:].any()
    # From weights relative to the running maximum, block by block, to those of the softmax.
    i, j = torch.arange(150)[:, None] + 50, torch.arange(200)
    seen = (j <= i) & (j >= i - window[0])
    wide = k.repeat_interleave(H // HKV, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, wide) * D**-0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    block = _get_block_size_n(q.device, D, True, True)
    weights = torch.zeros_like(scores)
    for first in range(0, 200, block):
        highest = scores[..., first:].amax(3, keepdim=True)
        own = dmask[:, :, :150, first : min(first + block, 200)]
        weights[..., first : first + block] = (
            own * torch.exp(highest - lse[..., None])
        ).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    torch.testing.assert_close(weights.abs(), torch.softmax(scores, 3), rtol=1e-4, atol=1e-6)
    dropped = (weights < 0).sum() / (weights != 0).sum()
    assert abs(dropped - p) < 0.02
    wide_v = v.repeat_interleave(H // HKV, 2)
    expected = torch.einsum("bhij,bjhd->bihd", weights.clamp(min=0.0) / (1 - p), wide_v)
    assert rel_l2(out, expected) < 1e-4


def test_a_backward_pass_drops_the_same_weights() -> None:
    q, k, v = batch(40, 50, grad=True)
    tail = (False, -1, -1, 0.0, 0, False)
    torch.manual_seed(4)
    out, lse, dmask, state = extension.fwd(q, k, v, None, None, 0.4, 0.25, *tail, True, None)
    again = extension.fwd(
        q, k, v, None, None, 0.4, 0.25, *tail, True, torch.Generator().manual_seed(8)
    )
    assert not torch.equal(dmask, again[2])
    stays = (dmask >= 0)[:, :, :40, :50]
    wide_k, wide_v = (x.repeat_interleave(H // HKV, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, wide_k) * 0.25
    kept = torch.softmax(scores, 3) * stays / 0.6
    truth = torch.einsum("bhij,bjhd->bihd", kept, wide_v)
    assert rel_l2(out, truth) < 1e-4
    wanted = torch.autograd.grad(truth.sum(), (q, k, v))
    found = extension.bwd(
        torch.ones_like(out), q, k, v, out, lse, None, None, None, None, 0.4, 0.25, *tail, True,
        None, state,
    )  # fmt: skip
    for one, other in zip(found[:3], wanted, strict=True):
        assert rel_l2(one, other) < 1e-4
    with pytest.raises(jitattn.InvalidInputError, match="rng_state"):
        extension.bwd(
            torch.ones_like(out), q, k, v, out, lse, None, None, None, None, 0.4, 0.25, *tail,
            True, None, None,
        )  # fmt: skip


def test_what_makes_no_sense_is_refused() -> None:
    q, k, v = batch(4, 4)
    tail = (False, -1, -1, 0.0, 0, False)
    with pytest.raises(jitattn.InvalidInputError, match="p_dropout is 0"):
        extension.fwd(q, k, v, None, None, 0.0, 0.25, *tail, True, None)
    with pytest.raises(jitattn.InvalidInputError, match="cache_seqlens"):
        extension.fwd_kvcache(
            q, k, v, k, v, None, None, None, None, None, None, None, None, 0.25, *tail, False, 0
        )
    table = torch.zeros(1, 1, dtype=torch.int32)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(jitattn.InvalidInputError, match="pages begin with keys"):
        extension.varlen_fwd(
            q[0], k, v, None, cu, cu, cu[:1], cu[:1], table, None, 4, 4, 0.0, 0.25, False, *tail,
            False, None,
        )  # fmt: skip
    with pytest.raises(jitattn.UnsupportedError, match="gather the pages"):
        flash_attn_varlen_func(
            q[0], k, v, cu, cu, 4, 4, 0.2, return_attn_probs=True, block_table=table
        )


@pytest.mark.parametrize("name", ["flash_attn_2_cuda", "flash_attn_2_cuda_vllm"])
def test_the_extension_is_found_by_name(name: str) -> None:
    with jitattn.compat.alias(name):
        assert importlib.import_module(name) is extension


def test_operators_have_fake_twins_and_the_same_results() -> None:
    q, k, v = batch(6, 9)
    given = (q, k, v, 0.0, 0.25, True, 4, 0, 0.0, 2, False, None, False)
    out, lse, _, _ = _wrapped_flash_attn_forward(*given)
    torch.testing.assert_close(out, _flash_attn_forward(*given)[0])
    operators = getattr(torch.ops, NAMESPACE)
    schema = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators._flash_attn_forward.default, given, test_utils=schema)
    room = [torch.zeros_like(x) for x in (q, k, v)]
    tail = (0.0, 0.25, True, 4, 0, 0.0, 2, False, None, False)
    arguments = (torch.ones_like(out), q, k, v, out, lse, *room, *tail)
    torch.library.opcheck(operators._flash_attn_backward.default, arguments, test_utils=schema)
    softmax_d = _flash_attn_backward(*arguments)
    assert softmax_d.shape == (2, H, 128)
    assert room[0].any()
    cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (6, 9))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    varlen = (*flat, cu_q, cu_k, 6, 9, 0.0, 0.25, True)
    forward = operators._flash_attn_varlen_forward
    torch.library.opcheck(forward.default, varlen, test_utils=schema)
    flat_out, flat_lse, _, _ = forward(*varlen)
    torch.testing.assert_close(
        flat_out,
        _flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, 0, False, None, False)[
            0
        ].flatten(0, 1),
    )
    room = [torch.zeros_like(x) for x in flat]
    results = (torch.ones_like(flat_out), *flat, flat_out, flat_lse)
    more = (cu_q, cu_k, 6, 9, 0.0, 0.25, True, -1, -1, 0.0, 0, False, None, False)
    backward = operators._flash_attn_varlen_backward
    torch.library.opcheck(backward.default, (*results, *room, *more), test_utils=schema)
    torch.testing.assert_close(_flash_attn_varlen_forward(*varlen)[0], flat_out)
    softmax_d = _flash_attn_varlen_backward(*results, *room, *more)
    assert softmax_d.shape == (H, 12 + 2 * 128)
    batched = [torch.zeros_like(x) for x in (q, k, v)]
    tail = (0.0, 0.25, True, -1, -1, 0.0, 0, False, None, False)
    out, lse, _, _ = _flash_attn_forward(*(q, k, v), *tail[:-2], None, False)
    _flash_attn_backward(torch.ones_like(out), q, k, v, out, lse, *batched, *tail)
    for one, other in zip(room, batched, strict=True):
        torch.testing.assert_close(one, other.flatten(0, 1))
    given_fwd = (None, cu_q, cu_k, None, None, None, None, 6, 9, 0.0, 0.25, False)
    tail = (True, -1, -1, 0.0, 0, False, False)
    torch.library.opcheck(
        operators.varlen_fwd.default, (*flat, *given_fwd, *tail), test_utils=schema
    )

"""Tests the FlashAttention and SWAA door against a dense fp64 reference of their documentation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jitattn
from jitattn.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from jitattn.compat.flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from jitattn.compat.flash_attn.utils.benchmark import (
    benchmark_all,
    benchmark_backward,
    benchmark_combined,
    benchmark_forward,
    benchmark_fwd_bwd,
    benchmark_memory,
)
from tests.support.compare import rel_l2
from tests.support.compat_flash_attn import CASES, HKV, D, H, dense, sequences
from tests.support.compat_flash_pages import cumulative

LENGTHS_Q, LENGTHS_KV = (7, 1, 0, 20), (30, 12, 9, 20)
TAIL = [
    "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "keep_first",
    "force_fa_decode", "alibi_slopes", "deterministic", "return_attn_probs",
]  # fmt: skip


def check(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    if got.numel():
        assert rel_l2(got, wanted) < 1e-5


def test_arguments_stand_where_swaa_has_them() -> None:
    def names(function: Any) -> list[str]:
        kinds = inspect.signature(function).parameters.values()
        return [one.name for one in kinds if one.kind is not one.KEYWORD_ONLY]

    assert names(flash_attn_func) == ["q", "k", "v", *TAIL]
    assert names(flash_attn_kvpacked_func) == ["q", "kv", *TAIL]
    assert names(flash_attn_qkvpacked_func) == ["qkv", *TAIL]
    lengths = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert names(flash_attn_varlen_func) == ["q", "k", "v", *lengths, *TAIL, "block_table"]
    assert names(flash_attn_varlen_kvpacked_func) == ["q", "kv", *lengths, *TAIL]
    assert names(flash_attn_varlen_qkvpacked_func) == ["qkv", "cu_seqlens", "max_seqlen", *TAIL]
    assert names(flash_attn_with_kvcache) == [
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens",
        "cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale", "causal",
        "window_size", "softcap", "keep_first", "force_fa_decode", "rotary_interleaved",
        "alibi_slopes", "num_splits", "return_softmax_lse",
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize(("len_q", "len_kv"), [(20, 20), (5, 30), (1, 30), (30, 5)])
def test_batched(name: str, len_q: int, len_kv: int) -> None:
    theirs, ours = CASES[name]
    q, k, v = (
        torch.stack(sequences((length,) * 2, heads, seed)).requires_grad_()
        for seed, (length, heads) in enumerate(((len_q, H), (len_kv, HKV), (len_kv, HKV)))
    )
    out, lse, dmask = flash_attn_func(q, k, v, return_attn_probs=True, **theirs)  # type: ignore[arg-type]
    truths = [dense(*one, **ours) for one in zip(q, k, v, strict=True)]  # type: ignore[arg-type]
    truth = torch.stack([one[0] for one in truths])
    check(out, truth)
    torch.testing.assert_close(lse, torch.stack([one[1] for one in truths]).float())
    assert dmask.numel() == 0
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(truth.square().sum(), (q, k, v))
    for one, other in zip(got, wanted, strict=True):
        assert rel_l2(one, other) < 1e-4


@pytest.mark.parametrize("name", list(CASES))
def test_one_after_another_and_in_pages(name: str) -> None:
    theirs, ours = CASES[name]
    q, k, v = (
        sequences(lengths, heads, seed)
        for seed, (lengths, heads) in enumerate(
            ((LENGTHS_Q, H), (LENGTHS_KV, HKV), (LENGTHS_KV, HKV))
        )
    )
    truths = [dense(*one, **ours)[0] for one in zip(q, k, v, strict=True)]  # type: ignore[arg-type]
    truth = torch.cat(truths)
    sizes = (cumulative(LENGTHS_Q), cumulative(LENGTHS_KV), max(LENGTHS_Q), max(LENGTHS_KV))
    flat = [torch.cat(x) for x in (q, k, v)]
    check(flash_attn_varlen_func(*flat, *sizes, **theirs), truth)  # type: ignore[arg-type]
    kv = torch.stack(flat[1:], dim=1)
    check(flash_attn_varlen_kvpacked_func(flat[0], kv, *sizes, **theirs), truth)  # type: ignore[arg-type]

    page = 4
    counts = [-(-length // page) for length in LENGTHS_KV]
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    pages = [torch.full((sum(counts), page, HKV, D), float("nan")) for _ in range(2)]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(7)).tolist()
    for idx, count in enumerate(counts):
        for number in range(count):
            table[idx, number] = own = order.pop()
            for store, rows in zip(pages, (k[idx], v[idx]), strict=True):
                part = rows[number * page : (number + 1) * page]
                store[own, : len(part)] = part
    paged = flash_attn_varlen_func(flat[0], *pages, *sizes, block_table=table, **theirs)  # type: ignore[arg-type]
    check(paged, truth)


def test_used_keys_and_padding_on_the_left() -> None:
    q, k, v = (sequences(LENGTHS_KV, heads, seed) for seed, heads in enumerate((H, HKV, HKV)))
    used = torch.tensor([10, 12, 5, 19], dtype=torch.int32)
    pad = torch.tensor([3, 0, 5, 1], dtype=torch.int32)
    sizes = (cumulative(LENGTHS_KV), cumulative(LENGTHS_KV), max(LENGTHS_KV), max(LENGTHS_KV))
    out = flash_attn_varlen_func(
        *(torch.cat(x) for x in (q, k, v)), *sizes, causal=True, seqused_k=used, leftpad_k=pad
    )
    truth = torch.cat(
        [
            dense(q[b], k[b][pad[b] : used[b]], v[b][pad[b] : used[b]], causal=True)[0]
            for b in range(4)
        ]
    )
    check(out, truth)


def test_packed() -> None:
    qkv = torch.randn(2, 20, 3, H, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = flash_attn_qkvpacked_func(qkv, 0.0, None, True)
    check(out, flash_attn_func(*qkv.unbind(2), causal=True))
    check(out, flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True))
    sizes = (cumulative((20, 20)), 20)
    check(
        flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), *sizes, causal=True), out.flatten(0, 1)
    )
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert gradient.shape == qkv.shape


@pytest.mark.parametrize("causal", [False, True])
def test_slopes(causal: bool) -> None:
    q, k, v = (torch.stack(sequences((9, 9), h, s)) for s, h in enumerate((H, HKV, HKV)))
    slopes = torch.rand(2, H, generator=torch.Generator().manual_seed(2))
    out = flash_attn_func(q, k, v, causal=causal, alibi_slopes=slopes)
    truths = [
        dense(*one, causal=causal, slopes=own)[0] for *one, own in zip(q, k, v, slopes, strict=True)
    ]
    check(out, torch.stack(truths))


def test_dropout_depends_on_the_seed() -> None:
    q, k, v = (torch.stack(sequences((50, 50), h, s)) for s, h in enumerate((H, HKV, HKV)))
    torch.manual_seed(3)
    first = flash_attn_func(q, k, v, 0.3)
    assert not torch.equal(first, flash_attn_func(q, k, v, 0.3))
    torch.manual_seed(3)
    assert torch.equal(first, flash_attn_func(q, k, v, 0.3))


def test_with_a_cache() -> None:
    q, new_k, new_v = (torch.stack(sequences((2, 2), h, s)) for s, h in enumerate((H, HKV, HKV)))
    caches = [torch.stack(sequences((16, 16), HKV, seed)) for seed in (8, 9)]
    used = torch.tensor([5, 11], dtype=torch.int32)
    expected = [cache.clone() for cache in caches]
    truths = []
    for b in range(2):
        for cache, new in zip(expected, (new_k, new_v), strict=True):
            cache[b, used[b] : used[b] + 2] = new[b]
        stop = int(used[b]) + 2
        keys = (expected[0][b, :stop], expected[1][b, :stop])
        truths.append(dense(q[b], *keys, causal=True, window=(4, 0), keep_first=2))
    out, lse = flash_attn_with_kvcache(
        q, *caches, new_k, new_v, cache_seqlens=used, causal=True, window_size=(4, 0),
        keep_first=2, return_softmax_lse=True,
    )  # fmt: skip
    check(out, torch.stack([one[0] for one in truths]))
    torch.testing.assert_close(lse, torch.stack([one[1] for one in truths]).float())
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache, wanted)
    whole = flash_attn_with_kvcache(q, *caches)
    check(whole, torch.stack([dense(q[b], caches[0][b], caches[1][b])[0] for b in range(2)]))
    with pytest.raises(jitattn.InvalidInputError, match="cache_seqlens"):
        flash_attn_with_kvcache(q, *caches, new_k, new_v)


def test_padding_and_back() -> None:
    x = torch.randn(3, 6, 5).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    flat, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert flat.shape == (10, 5)
    assert cu_seqlens.tolist() == [0, 3, 9, 10]
    assert cu_seqlens.dtype is torch.int32
    assert (longest, used.tolist()) == (6, [3, 6, 1])
    assert torch.equal(flat, index_first_axis(x.flatten(0, 1), indices))
    back = pad_input(flat, indices, 3, 6)
    assert torch.equal(back, x * mask[..., None])
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, mask[..., None].expand_as(x).float())
    room = torch.zeros_like(mask)
    room[0, 3] = 1
    _, _, wider, _, still = unpad_input(x, mask, room)
    assert wider.tolist() == [0, 4, 10, 11]
    assert still.tolist() == [3, 6, 1]


@pytest.mark.parametrize("window", [(2, 2), (-1, 2), (0, 5), (5, 0)])
def test_a_reach_over_all_keys_is_none(window: tuple[int, int]) -> None:
    """It matters where there are more queries than keys."""
    (q,), (k, v) = sequences((20,), H, 1), sequences((2, 2), HKV, 2)
    wanted, wanted_lse = dense(q, k, v, window=window)
    batch = (q[None], k[None], v[None])
    out, lse, _ = flash_attn_func(*batch, window_size=window, return_attn_probs=True)
    torch.testing.assert_close(out[0].double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0].double(), wanted_lse, atol=1e-5, rtol=1e-5)
    starts = [torch.tensor([0, len(x)], dtype=torch.int32) for x in (q, k)]
    out = flash_attn_varlen_func(q, k, v, *starts, len(q), len(k), window_size=window)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_cache_has_no_gradient_and_asks_for_none_to_be_wanted() -> None:
    (q,), (k, v) = sequences((1,), H, 1), sequences((9, 9), HKV, 2)
    wanted = flash_attn_with_kvcache(q[None], k[None], v[None])
    q.requires_grad_()
    out = flash_attn_with_kvcache(q[None], k[None], v[None], cache_seqlens=np.int64(9))
    assert not out.requires_grad
    assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [("window_size", None), ("window_size", (1,)), ("window_size", (1.5, 0)), ("keep_first", -1),
     ("keep_first", 2.5)],
)  # fmt: skip
def test_windows_of_another_kind_are_refused(name: str, value: object) -> None:
    q = torch.randn(1, 3, H, D)
    with pytest.raises(ValueError, match=f"{name}="):
        flash_attn_func(q, q, q, causal=True, **{name: value})


def test_timers(capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v = (torch.randn(1, 9, H, D, requires_grad=True) for _ in range(3))
    own = (flash_attn_func, q, k, v)
    timed = [
        *benchmark_all(*own, repeats=2, desc="it", causal=True),
        *benchmark_fwd_bwd(*own, repeats=1, desc="it"),
    ]
    assert q.grad is not None
    assert capsys.readouterr().out.count("it - ") == 5
    quiet: dict[str, Any] = {
        "repeats": 1,
        "verbose": False,
        "amp": True,
        "amp_dtype": torch.bfloat16,
    }
    timed += [f(*own, **quiet) for f in (benchmark_forward, benchmark_backward, benchmark_combined)]
    assert all(measured.mean > 0 for _, measured in timed)
    with pytest.raises(ValueError, match="must be alike"):
        benchmark_backward(*own, grad=q[:, :1])
    assert not capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch sees no GPU"):
            benchmark_memory(*own)


def test_refusals_are_runtime_errors_in_the_words_of_the_door() -> None:
    q, k = torch.randn(1, 3, H, D), torch.randn(1, 9, HKV, D)
    cu = cumulative((3,))
    calls: dict[str, Callable[[], object]] = {
        r"^softmax_scale=": lambda: flash_attn_func(q, k, k, softmax_scale=float("nan")),
        r"heads": lambda: flash_attn_func(q, k[:, :, :1].expand(1, 9, 3, D), k),
        r"sequences differ": lambda: flash_attn_varlen_func(q[0], k[0], k[0], cu, cu[:1], 3, 9),
        r"cache_batch_idx and block_table": lambda: flash_attn_with_kvcache(
            q, k, k, cache_seqlens=3, cache_batch_idx=cu, block_table=cu[None]
        ),
        r"^cache_seqlens has 2 entries": lambda: flash_attn_with_kvcache(q, k, k, cache_seqlens=cu),
        r"rotary_cos and rotary_sin": lambda: flash_attn_with_kvcache(
            q, k, k, k[:, :3], k[:, :3], q[0, :, 0], cache_seqlens=3
        ),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message) as caught:
            call()
        assert isinstance(caught.value, jitattn.InvalidInputError)

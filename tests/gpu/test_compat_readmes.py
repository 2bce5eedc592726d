"""Tests the readme examples of the five systems, under the names that they import.

The calls of flash-cosine-sim-attention and fast-ops are in test_compat.py.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable

import pytest
import torch

import jitattn
from tests.support import compat_dkernel, compat_flash_attn, compat_warp
from tests.support.compare import rel_l2

Sized = Callable[[int, int], int]

HALF = {"device": "cuda", "dtype": torch.half}
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


@pytest.fixture(name="sized")
def _sized(request: pytest.FixtureRequest) -> Sized:
    """Choose between a readme's own size and one that an emulator runs in seconds."""
    is_emulated = request.config.getoption("--emulate") is not None
    return lambda own, small: small if is_emulated else own


@pytest.mark.real_gpu
def test_warp_attention() -> None:
    """Batches, histories of different lengths, queries of different lengths, gears."""
    batch, heads, dim, most_q, most_kv = 4, 8, 64, 30, 500
    with jitattn.compat.alias("warp_attention"):
        theirs = importlib.import_module("warp_attention")
    forward, older = theirs.warp_attention_forward, theirs._warp_attention_forward
    query = torch.randn(batch, most_q, heads, dim, **HALF)
    key, value = (torch.randn(batch, most_kv, heads, dim, **HALF) for _ in range(2))
    out = older(query=query, key=key, value=value, is_causal=False)
    truth = [compat_warp.dense(*one, None, False) for one in zip(query, key, value, strict=True)]
    assert rel_l2(out, torch.stack(truth)) < 2e-3
    for gear in range(theirs.num_gears):
        assert rel_l2(forward(query=query, key=key, value=value, gear=gear), out) < 2e-3
    theirs.set_default_gear(3)
    assert rel_l2(forward(query=query, key=key, value=value), out) < 2e-3
    theirs.set_default_gear(4)

    start = torch.arange(batch, device="cuda") * most_kv
    length = torch.randint(most_kv, size=(batch,), device="cuda")
    length[0] = 0  # the readme's draw may be
    flat = {"key": key.flatten(0, 1), "value": value.flatten(0, 1)}
    history = {"kv_seq_start": start, "kv_seq_len": length, "kv_max_seq_len": most_kv}
    out = forward(query=query, **flat, is_causal=False, **history)
    for b, count in enumerate(length.tolist()):
        own = compat_warp.dense(query[b], key[b, :count], value[b, :count], None, False)
        assert rel_l2(out[b], own) < 2e-3

    q_len = torch.randint(1, most_q, size=(batch,), device="cuda")
    for q_start in (q_len.cumsum(0) - q_len[0], q_len.cumsum(0) - q_len):  # the readme's, and right
        queries = torch.randn(int(q_len.sum()), heads, dim, **HALF)
        own = {"q_seq_start": q_start, "q_seq_len": q_len, "q_max_seq_len": most_q}
        out = forward(query=queries, **flat, is_causal=False, **history, **own)
        assert torch.isfinite(out).all()
    for b, (first, count) in enumerate(zip(q_start.tolist(), length.tolist(), strict=True)):
        rows = slice(first, first + int(q_len[b]))
        own = compat_warp.dense(queries[rows], key[b, :count], value[b, :count], None, False)
        assert rel_l2(out[rows], own) < 2e-3


def test_dkernel(sized: Sized) -> None:
    """A local + stride module called twice, and a random pattern that is no use to a cache."""
    length, heads, size = sized(8192, 512), sized(32, 4), 64
    local_blocks, dim = sized(32, 3), sized(128, 16)
    with jitattn.compat.alias("dkernel"):
        theirs = importlib.import_module("dkernel")
    q, k, v = (torch.rand(2, length, heads, dim, device="cuda").requires_grad_() for _ in range(3))
    some = sorted({0, heads // 2 - 1, heads - 1})  # what is compared: a head has its own pattern

    def compare(out: torch.Tensor, pattern: torch.Tensor, scale: float | None) -> None:
        with torch.enable_grad():
            own = (x[1, :, some] for x in (q, k, v))
            truth, _ = compat_dkernel.dense(*own, pattern[some], size, scale=scale)
        assert rel_l2(out[1, :, some], truth) < 1e-5
        # Not of the sum, whose dq all but vanishes: there plain fp32 has an error of 1.6e-4 itself.
        d_out = torch.randn_like(out)
        got = torch.autograd.grad(out, (q, k, v), d_out)
        wanted = torch.autograd.grad(truth, (q, k, v), d_out[1, :, some].to(truth.dtype))
        for one, other in zip(got, wanted, strict=True):
            assert rel_l2(one[1, :, some], other[1, :, some]) < 1e-4

    layer = theirs.LocalStrideSparseAttention(heads, length, size, local_blocks, 8, seq_dim=1)
    layer.to("cuda")
    with torch.enable_grad():
        first, again = layer(q, k, v), layer(q, k, v)
    assert torch.equal(first, again)
    compare(again, layer.sparse_pattern, None)

    count = length // size
    blocks = torch.rand(heads, count, count) > 0.8
    blocks.diagonal(dim1=1, dim2=2)[:] = True
    blocks &= torch.ones(count, count, dtype=torch.bool).tril()
    with pytest.warns(UserWarning, match="kv cache"):
        layer = theirs.SparseAttention(size, blocks, seq_dim=1)
    layer.to("cuda")
    with torch.enable_grad():
        out = layer(q, k, v, sm_scale=0.008)
    compare(out, blocks.to("cuda"), 0.008)


@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_vllm"])
def test_flash_attn(package: str, sized: Sized) -> None:
    """Windows of several sizes over grouped heads, with first keys kept."""
    with jitattn.compat.alias(package):
        theirs = importlib.import_module(package)
    length, heads, heads_kv = sized(10000, 300), sized(32, 4), sized(4, 2)
    q = torch.randn(1, length, heads, 128, **BF16)
    k, v = (torch.randn(1, length, heads_kv, 128, **BF16) for _ in range(2))
    rows = slice(0, length, 97)
    for own in (-1, 100, 1000, 4000, 8000):
        window = own if own < 0 else sized(own, own // 40)
        out = theirs.flash_attn_func(
            q, k, v, causal=True, window_size=(window, window), keep_first=4, force_fa_decode=True
        )
        i = torch.arange(length, device="cuda")[rows, None]
        j = torch.arange(length, device="cuda")
        seen = j <= i
        if window >= 0:
            seen = seen & ((j >= i - window) | (j < 4))
        wide_k, wide_v = (x[0].double().repeat_interleave(heads // heads_kv, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[0, rows].double(), wide_k) * 128**-0.5
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), 2)
        assert rel_l2(out[0, rows], torch.einsum("hij,jhd->ihd", weights, wide_v)) < 1e-2


def test_flash_attn_varlen(sized: Sized) -> None:
    with jitattn.compat.alias("flash_attn"):
        theirs = importlib.import_module("flash_attn")
    heads, heads_kv, window = sized(32, 4), sized(4, 2), sized(4000, 40)
    lengths = [1, 2, sized(2000, 100), sized(3000, 150)]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    total, most = sum(lengths), max(lengths)
    q = torch.randn(total, heads, 128, **BF16)
    k, v = (torch.randn(total, heads_kv, 128, **BF16) for _ in range(2))
    out = theirs.flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens.clone(), most, most, causal=True,
        window_size=(window, window), keep_first=4, force_fa_decode=True,
    )  # fmt: skip
    assert out.shape == q.shape
    for begin, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        own = slice(begin, begin + length)
        truth, _ = compat_flash_attn.dense(
            q[own], k[own], v[own], 128**-0.5, True, (window, 0), keep_first=4, force=True
        )
        assert rel_l2(out[own], truth) < 1e-2


@pytest.mark.real_gpu
@pytest.mark.parametrize("name", ["flash_attn_2_cuda", "flash_attn_2_cuda_vllm"])
def test_the_extension_over_small_pages(name: str) -> None:
    """Pages of 16, page 0 like any other, key lengths by `seqused_k`, and odd scale and softcap."""
    with jitattn.compat.alias(name):
        theirs = importlib.import_module(name)
    heads, dim, page, pages = 8, 64, 16, 1000
    len_q, len_kv = [100, 150, 300, 200], [1000, 1500, 2000, 1500]
    q = torch.randn(sum(len_q), heads, dim, **HALF)
    k, v = (torch.randn(pages, page, heads, dim, **HALF) for _ in range(2))
    cu_q = torch.tensor([0, *len_q], device="cuda").cumsum(0).int()
    table = torch.randint(0, pages, (4, max(len_kv) // 4 + 1), device="cuda", dtype=torch.int32)
    used = torch.tensor(len_kv, dtype=torch.int32, device="cuda")
    given = (cu_q, torch.zeros_like(cu_q), used, None, table, None, max(len_q), max(len_kv), 0.0)
    tail = (dim**0.5, False, True, 2000, 0, 1.0, 10, True, False, None)
    out = theirs.varlen_fwd(q, k, v, None, *given, *tail)[0]
    assert out.shape == q.shape
    for b, begin in enumerate(cu_q[:-1].tolist()):
        keys = torch.arange(len_kv[b], device="cuda")
        where = (table[b, keys // page].long(), keys % page)
        rows = torch.arange(0, len_q[b], 13, device="cuda")
        scores = torch.einsum("ihd,jhd->hij", q[begin + rows].double(), k[where].double()) * 8.0
        position = rows[:, None] + len_kv[b] - len_q[b]
        hidden = (keys > position) | ((keys < position - 2000) & (keys >= 10))
        weights = torch.softmax(torch.tanh(scores).masked_fill(hidden, float("-inf")), 2)
        truth = torch.einsum("hij,jhd->ihd", weights, v[where].double())
        assert rel_l2(out[begin + rows], truth) < 5e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs.varlen_fwd(q, k, v, None, *given, *tail)


@pytest.mark.real_gpu
def test_the_memory_of_a_call() -> None:
    """q, k, v and out, and nothing as large as the scores."""
    with jitattn.compat.alias("flash_attn"):
        theirs = importlib.import_module("flash_attn")
        timers = importlib.import_module("flash_attn.utils.benchmark")
    q, k, v = (torch.randn(1, 4096, 8, 64, **BF16) for _ in range(3))
    most = timers.benchmark_memory(theirs.flash_attn_func, q, k, v, verbose=False)
    assert 4 * q.nbytes <= most * 1e9
    before = torch.cuda.memory_allocated()
    assert most * 1e9 < before + 2 * q.nbytes

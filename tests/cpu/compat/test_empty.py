"""Tests empty inputs in every public function of the doors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import patterns
from jitattn.compat.dkernel import (
    LocalStrideSparseAttention,
    SparseAttention,
    combine_attn_partitions,
    get_sparse_attn_mask,
    utils,
)
from jitattn.compat.fast_ops.flash_attention.attention_ref import attention_ref
from jitattn.compat.fast_ops.flash_attention.flash_attention import FlashAttentionFunction
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import (
    flash_attn_triton,
    triton_dropout_mask,
)
from jitattn.compat.flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    l2norm_tensors,
    plain_cosine_sim_attention,
)
from jitattn.compat.flash_cosine_sim_attention.transformer import CosineSimCausalTransformer
from jitattn.compat.warp_attention import baseline_tester, util, warp_attention_forward

PATTERNS = [
    shape
    for dimensions in (2, 3)
    for shape in itertools.product((0, 1, 4), repeat=dimensions)
    if 0 in shape
]
#: Batch, queries, keys.
SIZES = [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)]


def call_inputs(batch: int, len_q: int, len_kv: int) -> list[Tensor]:
    lengths = (len_q, len_kv, len_kv)
    return [torch.randn(batch, length, 2, 16).requires_grad_() for length in lengths]


def check(out: Tensor, leaves: list[Tensor], shape: tuple[int, ...]) -> None:
    """Zeros, and so are the gradients."""
    assert out.shape == shape
    assert not out.any()
    found = torch.autograd.grad(out.sum(), leaves, allow_unused=True, retain_graph=True)
    for gradient in found:
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("shape", PATTERNS, ids=str)
def test_patterns(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    assert utils.is_kv_cache_efficient(empty, 16, 16)
    assert patterns.is_kv_cache_efficient(empty != 0)
    assert patterns.describe(empty != 0).density == 0
    if shape[-1] == shape[-2]:
        assert utils.is_causal(empty)
    utils.verify_sparse_pattern(empty)
    for values in (False, True):
        crow, col = utils.dense_to_crow_col(empty, values)
        assert crow.shape == (*shape[:-2], shape[-2] + 1)
        assert col.numel() == 0
        # As wide as its last block: there is none.
        assert utils.crow_col_to_dense(crow, col).shape == (*shape[:-1], 0)
        ccol, row = utils.dense_to_ccol_row(empty, values)
        assert utils.ccol_row_to_dense(ccol, row).shape == (*shape[:-2], 0, shape[-1])
    if len(shape) == 3:
        no_rows = torch.zeros(shape[0], 0, 4)
        for block_m in (8, 16, 32):
            crow, _ = utils.merge_split_fwd_kernel_blocks(16, no_rows, block_m, 16)
            assert crow.shape == (shape[0], 1)
    first_empty = shape.index(0)
    assert utils.zero_stride(empty, first_empty).stride(first_empty) == 0
    assert patterns.from_tokens(empty != 0, 16).numel() in (0, 1, 4)


def test_2_d_patterns_are_those_of_one_head() -> None:
    pattern = torch.rand(6, 6) < 0.5
    for one in (pattern, torch.ones(6, 6).tril()):
        assert utils.is_kv_cache_efficient(one, 16, 16) == utils.is_kv_cache_efficient(
            one[None], 16, 16
        )
    with pytest.raises(AssertionError, match="x has 0 dimensions"):
        utils.zero_stride(torch.tensor(1.0))


def test_patterns_of_no_tokens() -> None:
    for given in ({}, {"causal": False}, {"homo_head": True}, {"num_kv_heads": 2}):
        (crow, col), mask, dense = get_sparse_attn_mask(4, 0, 16, 2, 3, return_dense=True, **given)
        assert crow.shape[1] == 1
        assert mask.shape[1:] == (0, 0)
        assert dense is not None
        assert col.numel() == dense.numel() == 0
    assert get_sparse_attn_mask(4, 32, 16, 2, 3, kv_seqlen=0)[1].shape == (4, 2, 0)
    assert get_sparse_attn_mask(4, 32, 16, 2, 3, past_len=32)[1].shape == (4, 0, 2)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_dkernel(size: tuple[int, int, int], causal: bool) -> None:
    q, k, v = call_inputs(*size)
    rule = LocalStrideSparseAttention(2, 64, 16, 2, 3, causal=causal)
    own = SparseAttention(16, torch.ones(4, 4).tril(), causal=causal)
    for layer in (rule, own):
        out, lse = layer(q, k, v, return_lse=True)
        check(out, [q, k, v], q.shape)
        assert lse.shape == (size[0], 2, size[1])
        together = combine_attn_partitions((out, lse), (out, lse), hdim=2)
        check(together, [q, k, v], q.shape)
        if size[1] <= max(1, size[2]):
            used = torch.full((size[0],), size[2])
            check(layer(q, k, v, seqlens=used), [q, k, v], q.shape)
    nothing = SparseAttention(16, torch.zeros(1, 0, 4), causal=causal)
    if size[1] == 0:
        check(nothing(q, k, v), [q, k, v], q.shape)


@pytest.mark.parametrize("ends", [[0], [0, 0, 0]], ids=str)
def test_dkernel_packed(ends: list[int]) -> None:
    q = torch.zeros(0, 2, 16).requires_grad_()
    layer = LocalStrideSparseAttention(2, 64, 16, 2, 3)
    check(layer(q, q, q, cu_seqlen_k=torch.tensor(ends)), [q], q.shape)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("function", [flash_cosine_sim_attention, plain_cosine_sim_attention])
def test_cosine(function: Any, size: tuple[int, int, int], causal: bool) -> None:
    q, k, v = (x.transpose(1, 2) for x in call_inputs(*size))
    for given in (
        {},
        {"mask": torch.ones(size[0], size[2], dtype=torch.bool)},
        {"attn_bias": torch.zeros(2, size[1], size[2])},
        {"attn_bias": torch.zeros(2, 5)},
    ):
        check(function(q, k, v, causal=causal, **given), [q, k, v], q.shape)


def test_cosine_helpers() -> None:
    assert l2norm_tensors() == ()
    for shape in ((0,), (0, 4), (4, 0)):
        one, other = l2norm_tensors(torch.zeros(shape), torch.zeros(shape))
        assert one.shape == other.shape == shape
    model = CosineSimCausalTransformer(
        num_tokens=8, dim=16, max_seq_len=12, depth=1, heads=2, dim_head=8
    )
    tokens = torch.zeros(2, 0, dtype=torch.long)
    assert model(tokens).shape == (2, 0, 8)
    assert model.generate(tokens, 0).shape == (2, 0)
    assert model.generate(torch.zeros(0, 3, dtype=torch.long), 2).shape == (0, 2)
    with pytest.raises(jitattn.InvalidInputError, match="start_tokens has shape"):
        model.generate(tokens, 3)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_fast_ops(size: tuple[int, int, int], causal: bool) -> None:
    q, k, v = call_inputs(*size)
    batch, len_q, len_kv = size
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    for bias in (None, torch.zeros(1, 1, 1, len_kv), torch.zeros(1, 2, len_q, len_kv)):
        for p in (0.0, 0.5):
            check(flash_attn_triton(q, k, v, bias, causal, p), [q, k, v], q.shape)
        out = FlashAttentionFunction.apply(*turned, bias, causal)
        check(out, [q, k, v], turned[0].shape)
        check(attention_ref(q, k, v, causal=causal, bias=bias)[0], [q, k, v], q.shape)
    assert triton_dropout_mask(0.5, batch, 2, len_q, len_kv, "cpu").shape == (
        batch, 2, len_q, len_kv,
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_warp(size: tuple[int, int, int], causal: bool) -> None:
    q, k, v = call_inputs(*size)
    check(warp_attention_forward(q, k, v, is_causal=causal), [q, k, v], q.shape)
    check(baseline_tester.attn(q, k, v, causal), [q, k, v], q.shape)


@pytest.mark.parametrize("longest", [-1, 0])
@pytest.mark.parametrize("count", [0, 2])
def test_warp_ragged(count: int, longest: int) -> None:
    nowhere = torch.zeros(count, dtype=torch.int64)
    q = torch.zeros(0, 2, 16).requires_grad_()
    given = [nowhere] * 4 + [longest] * 2
    out = warp_attention_forward(q, q, q, None, None, None, -1, False, *given)
    check(out, [q], q.shape)
    assert util.bmm_flop(0, 0, 0, 0) == util.attn_flop(0, 0, 0, 0, 0, True) == 0

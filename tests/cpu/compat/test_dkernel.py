"""Tests patterns of the dkernel door against a dense fp64 reference of its documentation."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch

import jitattn
from jitattn.compat.dkernel import (
    LocalStrideSparseAttention,
    SparseAttention,
    get_sparse_attn_mask,
    utils,
)
from tests.support.compat_dkernel import SIZE, blocks, check, dense, first_row, tensors

RULES: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 2, "num_dense_heads": 1},
    {"head_sliding_offset": 1},
    {"homo_head": True},
    {"homo_head": True, "num_kv_heads": 2, "head_sliding_offset": 2},
    {"causal": False},
    {"causal": False, "num_dense_heads": 1},
]


def rule_of(given: dict[str, Any], heads: int) -> dict[str, Any]:
    return {
        "heads_kv": given.get("num_kv_heads") or heads,
        "offset": given.get("head_sliding_offset", 0),
        "dense": given.get("num_dense_heads", 0),
        "causal": given.get("causal", True),
        "homo": given.get("homo_head", False),
    }


@pytest.mark.parametrize("given", RULES, ids=str)
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_the_pattern(given: dict[str, Any], stride: int) -> None:
    heads, rows = 4, 7
    (crow, col), mask, tokens = get_sparse_attn_mask(
        heads, 100, SIZE, 2, stride, return_dense=True, **given
    )
    wanted = blocks(heads, rows, rows, (2, 1 if given.get("causal", True) else 2), stride,
                    **rule_of(given, heads))  # fmt: skip
    assert mask.dtype is torch.bfloat16
    assert torch.equal(mask.bool().expand(heads, rows, rows).cpu(), wanted)
    assert torch.equal(utils.crow_col_to_dense(crow, col, torch.bool).cpu(), mask.bool().cpu())
    assert tokens is not None
    for i, j in ((0, 0), (17, 3), (50, 51), (99, 99), (99, 12), (40, 80)):
        seen = wanted[:, i // SIZE, j // SIZE] & (not given.get("causal", True) or j <= i)
        assert torch.equal(tokens[:, i, j].bool().expand(heads).cpu(), seen)


def test_parts_of_a_pattern() -> None:
    whole = get_sparse_attn_mask(4, 128, SIZE, 2, 4)[1]
    part = get_sparse_attn_mask(4, 32, SIZE, 2, 4, kv_seqlen=64, q_start_position=64,
                                kv_start_position=32)[1]  # fmt: skip
    assert torch.equal(part, whole[:, 4:6, 2:6])
    late, _ = get_sparse_attn_mask(4, 128, SIZE, 2, 4, past_len=32)[1:]
    assert torch.equal(late, whole[:, 2:])
    assert get_sparse_attn_mask(4, 128, SIZE, 2, 4, past_len=10)[1].shape[1] == 8
    relative = get_sparse_attn_mask(4, 64, SIZE, 1, 2, vert_position_type="relative")[1]
    assert relative[0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("given", RULES, ids=str)
@pytest.mark.parametrize("len_q", [100, 1, 40])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_local_stride(given: dict[str, Any], len_q: int, heads_kv: int) -> None:
    heads = 4
    q, k, v = tensors(len_q, 100, (heads, heads_kv))
    layer = LocalStrideSparseAttention(heads, 120, SIZE, 2, 3, seq_dim=1, **given)
    assert layer.max_seqlen == 128
    out, lse = layer(q, k, v, return_lse=True)
    local = (2, 1 if given.get("causal", True) else 2)
    pattern = blocks(heads, 8, 8, local, 3, **rule_of(given, heads))
    assert torch.equal(layer.sparse_pattern.expand(heads, 8, 8).cpu(), pattern)
    truths = [
        dense(*one, pattern, SIZE, given.get("causal", True)) for one in zip(q, k, v, strict=True)
    ]
    check(out, torch.stack([one[0] for one in truths]), [q, k, v])
    torch.testing.assert_close(lse, torch.stack([one[1] for one in truths]).float())
    turned = LocalStrideSparseAttention(heads, 120, SIZE, 2, 3, seq_dim=2, **given)
    again = turned(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(again.transpose(1, 2), out)


@pytest.mark.parametrize("given", [{}, {"num_kv_heads": 4, "num_dense_heads": 2}], ids=str)
@pytest.mark.parametrize("part", [(0, 4), (2, 6), (4, 8), (1, 3)])
def test_a_part_of_the_heads(given: dict[str, Any], part: tuple[int, int]) -> None:
    first, last = part
    layer = LocalStrideSparseAttention(8, 128, SIZE, 1, 4, active_head_range=part, **given)
    group = 8 // given.get("num_kv_heads", 8)
    heads_kv = (last - first) // group if first % group == last % group == 0 else last - first
    q, k, v = tensors(100, 100, (last - first, heads_kv))
    pattern = blocks(8, 8, 8, (1, 1), 4, **rule_of(given, 8))[first:last]
    truth = torch.stack([dense(*one, pattern, SIZE)[0] for one in zip(q, k, v, strict=True)])
    check(layer(q, k, v), truth, [q, k, v])


@pytest.mark.parametrize("seed", range(6))
def test_any_pattern_is_met_exactly(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice((16, 32, 64))
    len_kv = chance.choice((100, 128, 200))
    len_q = chance.choice((len_kv, 1, 37))
    causal, heads = chance.random() < 0.7, chance.choice((1, 4, 2))
    count = -(-len_kv // size)
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.rand(heads, count, count, generator=generator) < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        layer = SparseAttention(size, pattern.to(torch.uint8), causal=causal,
                                block_m=128 if causal else None)  # fmt: skip
    q, k, v = tensors(len_q, len_kv, seed=seed)
    wide = pattern.repeat_interleave(4 // heads, 0) if heads > 1 else pattern
    truth = [dense(*one, wide, size, causal, 0.3)[0] for one in zip(q, k, v, strict=True)]
    check(layer(q, k, v, 0.3), torch.stack(truth), [q, k, v])


def test_large_blocks_are_cut() -> None:
    pattern = torch.tensor([[1, 0], [1, 1]])
    q, k, v = tensors(500, 500)
    layer = SparseAttention(256, pattern)
    truth = [dense(*one, pattern[None].bool(), 256)[0] for one in zip(q, k, v, strict=True)]
    check(layer(q, k, v), torch.stack(truth), [q, k, v])
    local = LocalStrideSparseAttention(4, 512, 256, 1, 2)
    assert local(q, k, v).shape == q.shape


def test_a_pattern_of_the_last_queries() -> None:
    q, k, v = tensors(48, 112)
    (_, pattern, _) = get_sparse_attn_mask(
        4, 48, SIZE, 1, 3, kv_seqlen=112, q_start_position=64, dtype=torch.uint8
    )
    layer = SparseAttention(SIZE, pattern)
    truth = [
        dense(*one, pattern.bool(), SIZE, first_row=64)[0] for one in zip(q, k, v, strict=True)
    ]
    check(layer(q, k, v), torch.stack(truth), [q, k, v])
    # One query fewer: now it is the rows of queries that count, whatever blocks their keys are in.
    truth = [
        dense(*one, pattern.bool(), SIZE, first_row=65)[0]
        for one in zip(q[:, :47], k, v, strict=True)
    ]
    check(layer(q[:, :47], k, v), torch.stack(truth), [q, k, v])
    with pytest.raises(jitattn.InvalidInputError, match="as many rows as columns"):
        layer(q, k, v, seqlens=torch.tensor([100, 90]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (8, 8), (1, 4)], ids=str)
@pytest.mark.parametrize(
    "lengths", [(16, 50), (64, 64), (64, 40), (100, 64), (128, 48), (1, 40)], ids=str
)
def test_any_lengths_on_any_pattern(
    shape: tuple[int, int], lengths: tuple[int, int], causal: bool
) -> None:
    len_q, len_kv = lengths
    generator = torch.Generator().manual_seed(len_q)
    for heads, seq_dim in ((4, 1), (1, 2)):
        pattern = torch.rand(heads, *shape, generator=generator) < 0.6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            layer = SparseAttention(SIZE, pattern, causal=causal, seq_dim=seq_dim)
        q, k, v = tensors(len_q, len_kv)
        moved = [x if seq_dim == 1 else x.transpose(1, 2) for x in (q, k, v)]
        begin = first_row(shape, len_q, len_kv, causal)
        if len_kv - begin > shape[0] * SIZE:  # the last query has no row
            with pytest.raises(AssertionError, match="a row for every block"):
                layer(*moved)
            continue
        out, lse = layer(*moved, return_lse=True)
        truths = [
            dense(*one, pattern, SIZE, causal, first_row=begin) for one in zip(q, k, v, strict=True)
        ]
        wanted, wanted_lse = (torch.stack(part) for part in zip(*truths, strict=True))
        out = out if seq_dim == 1 else out.transpose(1, 2)
        check(out, wanted, [q, k, v], (lse, wanted_lse))


def test_more_queries_than_keys() -> None:
    q, k, v = (x.detach() for x in tensors(64, 32))
    whole = jitattn.attention(q, k, v)
    torch.testing.assert_close(
        SparseAttention(SIZE, torch.ones(4, 4), causal=False)(q, k, v), whole
    )
    for given in ({}, {"homo_head": True}):
        layer = LocalStrideSparseAttention(4, 64, SIZE, 1, 1, causal=False, **given)
        torch.testing.assert_close(layer(q, k, v), whole)
    # Causal, they are the last ones: those before the first key see nothing.
    layer = LocalStrideSparseAttention(4, 64, SIZE, 2, 3, num_kv_heads=2)
    out = layer(q, k, v)
    torch.testing.assert_close(out[:, 32:], layer(q[:, 32:], k, v))
    assert not out[:, :32].any()
    for given in ({"seqlens": torch.tensor([30, 32])}, {"left_paddings": torch.tensor([3, 0])}):
        with pytest.raises(AssertionError, match="there must be as many"):
            layer(q, k, v, **given)
    cu_q, cu_k = torch.tensor([0, 4, 64]), torch.tensor([0, 2, 64])
    packed = torch.cat([q[0], k[0].repeat(2, 2, 1), v[0].repeat(2, 2, 1)], 1)
    with pytest.raises(AssertionError, match="sequence 0 has 4 queries and 2 keys"):
        layer(*packed.split(4, 1), cu_seqlen_q=cu_q, cu_seqlen_k=cu_k)


def test_room_for_the_result_of_two_calls() -> None:
    q, k, v = (x.detach() for x in tensors(20, 60))
    room = torch.empty_like(q)
    pattern = torch.ones(2, 4)
    out = SparseAttention(SIZE, pattern, out=room)(q, k, v)
    assert out is room
    torch.testing.assert_close(out, SparseAttention(SIZE, pattern)(q, k, v))
    with pytest.raises(jitattn.InvalidInputError, match="out has shape"):
        SparseAttention(SIZE, pattern, out=room[:, :1])(q, k, v)

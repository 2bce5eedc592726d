"""Tests xformers' biases: how they are made, split, moved and changed in place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

import jitattn
from jitattn.compat.xformers.ops import fmha
from jitattn.compat.xformers.ops.fmha.attn_bias import (
    VARLEN_BIASES,
    AttentionBias,
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask,
    BlockDiagonalCausalLocalAttentionPaddedKeysMask,
    BlockDiagonalCausalMask,
    BlockDiagonalCausalWithOffsetGappyKeysMask,
    BlockDiagonalCausalWithOffsetPaddedKeysMask,
    BlockDiagonalGappyKeysMask,
    BlockDiagonalLocalAttentionPaddedKeysMask,
    BlockDiagonalMask,
    BlockDiagonalPaddedKeysMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightLocalAttentionMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    LowerTriangularMaskWithTensorBias,
    PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
    PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    PagedBlockDiagonalGappyKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
    _GappySeqInfo,
    _PaddedSeqLenInfo,
    _SeqLenInfo,
)
from tests.support.inputs import drawn

CPU = torch.device("cpu")
TABLE = torch.tensor([[3, 0, 1], [2, 5, 4]], dtype=torch.int32)


def test_the_examples_of_the_original() -> None:
    """Of its documentation: lengths, padded lengths, lengths with gaps, a window."""
    plain = _SeqLenInfo.from_seqlens([2, 3, 2], device=CPU)
    assert (plain.max_seqlen, plain.min_seqlen, plain.seqstart_py) == (3, 2, [0, 2, 5, 7])
    assert plain.seqstart.tolist() == [0, 2, 5, 7]
    assert plain.seqstart.dtype is torch.int32
    padded = _PaddedSeqLenInfo.from_seqlens_padded([2, 3, 2], 4, device=CPU)
    assert padded.seqstart_py == [0, 4, 8, 12]
    assert padded.seqlen.tolist() == padded.seqlen_py == [2, 3, 2]
    assert list(padded.intervals()) == [(0, 2), (4, 7), (8, 10)]
    gappy = _GappySeqInfo.from_seqlens_gappy([0, 7, 12, 14], [6, 3, 1], False, device=CPU)
    assert (gappy.max_seqlen, gappy.min_seqlen) == (6, 1)
    assert list(gappy.intervals()) == [(0, 6), (7, 10), (12, 13)]
    window = LocalAttentionFromBottomRightMask(window_left=1, window_right=2)
    assert window.materialize((4, 5)).exp().int().tolist() == [
        [1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_tensors_are_joined_and_split() -> None:
    tensors = [drawn(b, n, 2, 16, seed=n) for b, n in ((1, 3), (2, 6), (1, 2))]
    bias, x = BlockDiagonalMask.from_tensor_list(tensors)
    assert x.shape == (1, 17, 2, 16)
    assert bias.q_seqinfo.seqstart_py == [0, 3, 9, 15, 17]
    out = fmha.memory_efficient_attention(x, x, x, bias)
    for one, own in zip(tensors, bias.split(out), strict=True):
        torch.testing.assert_close(own, fmha.memory_efficient_attention(one, one, one))
    keys = [drawn(b, n, 2, 16, seed=n) for b, n in ((1, 5), (2, 1), (1, 9))]
    bias, q, k, v = BlockDiagonalMask.from_tensor_lists_qkv(tensors, keys, keys)
    assert [x.shape for x in bias.split_queries(q)] == [x.shape for x in tensors]
    assert [x.shape for x in bias.split_kv(k)] == [x.shape for x in keys]
    assert torch.equal(v, k)
    assert BlockDiagonalMask.from_tensor_lists_qkv(tensors, keys)[3] is None
    with pytest.raises(AssertionError, match="split_queries or split_kv"):
        bias.split(q)
    assert bias.make_causal()._batch_sizes == [1, 2, 1]


def test_what_one_makes_of_another() -> None:
    bias = BlockDiagonalMask.from_seqlens([3, 4], [5, 4], device=CPU)
    assert type(bias.make_causal()) is BlockDiagonalCausalMask
    own = bias.make_causal_from_bottomright()
    assert type(own) is BlockDiagonalCausalFromBottomRightMask
    local = bias.make_local_attention(2)
    assert type(local) is BlockDiagonalCausalLocalAttentionMask
    local = bias.make_local_attention_from_bottomright(2)
    assert type(local) is BlockDiagonalCausalLocalAttentionFromBottomRightMask
    padded = BlockDiagonalPaddedKeysMask.from_seqlens([3, 4], 12, [5, 4], device=CPU)
    local = padded.make_local_attention(2, 1)
    assert type(local) is BlockDiagonalLocalAttentionPaddedKeysMask
    triangle = LowerTriangularFromBottomRightMask().make_local_attention(3)
    assert triangle == LowerTriangularFromBottomRightLocalAttentionMask(3)
    with_bias = LowerTriangularMask().add_bias(drawn(1, 2, 3, 3))
    assert type(with_bias) is LowerTriangularMaskWithTensorBias
    wanted = LowerTriangularMask().materialize((3, 3)) + with_bias._bias
    assert torch.equal(with_bias.materialize((1, 2, 3, 3)), wanted.expand(1, 2, 3, 3))
    paged = padded.make_paged(TABLE, 4, PagedBlockDiagonalCausalWithOffsetPaddedKeysMask)
    assert type(paged) is PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    assert paged.k_seqinfo.padding == 12
    gappy = BlockDiagonalGappyKeysMask.from_seqlens([3, 4], [2, 13, 24], [5, 4], device=CPU)
    paged = gappy.make_paged(TABLE, 4, 12, PagedBlockDiagonalCausalWithOffsetGappyKeysMask)
    assert paged.k_seqinfo.seqstart.tolist()[:2] == paged.k_seqinfo.seqstart_py[:2] == [2, 1]
    assert paged.k_seqinfo.seqlen.tolist() == list(paged.k_seqinfo.seqlen_py) == [7, 5]
    assert VARLEN_BIASES == fmha.VARLEN_BIASES
    assert isinstance(paged, VARLEN_BIASES)
    assert isinstance(triangle, AttentionBias)


def test_the_same_keys_in_pages() -> None:
    q, rows = drawn(1, 7, 2, 16), [drawn(1, 24, 2, 16, seed=seed) for seed in (1, 2)]
    pages = [torch.empty_like(x) for x in rows]
    places = (TABLE[:, :, None] * 4 + torch.arange(4)).flatten().long()
    for page, row in zip(pages, rows, strict=True):
        page[:, places] = row
    for kind, paged_kind in (
        (BlockDiagonalPaddedKeysMask, PagedBlockDiagonalPaddedKeysMask),
        (
            BlockDiagonalCausalWithOffsetPaddedKeysMask,
            PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
        ),
    ):
        bias = kind.from_seqlens([3, 4], 12, [5, 4], device=CPU)
        wanted = fmha.memory_efficient_attention(q, *rows, bias)
        paged = bias.make_paged(TABLE, 4, paged_kind)
        assert torch.equal(fmha.memory_efficient_attention(q, *pages, paged), wanted)
    for kind, paged_kind in (
        (BlockDiagonalGappyKeysMask, PagedBlockDiagonalGappyKeysMask),
        (
            BlockDiagonalCausalWithOffsetGappyKeysMask,
            PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
        ),
    ):
        bias = kind.from_seqlens([3, 4], [2, 13, 24], [5, 4], device=CPU)
        wanted = fmha.memory_efficient_attention(q, *rows, bias)
        paged = bias.make_paged(TABLE, 4, 12, paged_kind)
        assert torch.equal(fmha.memory_efficient_attention(q, *pages, paged), wanted)


def test_lengths_are_changed_in_place() -> None:
    q, k = drawn(1, 7, 2, 16), drawn(1, 24, 2, 16, seed=1)
    bias = BlockDiagonalPaddedKeysMask.from_seqlens([3, 4], 12, [5, 9], device=CPU)
    fmha.memory_efficient_attention(q, k, k, bias)
    bias.k_seqinfo.from_seqlens_padded_inplace([8, 2])
    bias.q_seqinfo.from_seqlens_inplace([4, 3])
    new = BlockDiagonalPaddedKeysMask.from_seqlens([4, 3], 12, [8, 2], device=CPU)
    out = fmha.memory_efficient_attention(q, k, k, bias)
    assert torch.equal(out, fmha.memory_efficient_attention(q, k, k, new))
    assert torch.equal(bias.materialize((7, 24)), new.materialize((7, 24)))
    # As programs with captured graphs do: lengths on the device alone, up to the padding.
    bias.k_seqinfo.seqlen.copy_(torch.tensor([12, 1]))
    longer = BlockDiagonalPaddedKeysMask.from_seqlens([4, 3], 12, [12, 1], device=CPU)
    out = fmha.memory_efficient_attention(q, k, k, bias)
    assert torch.equal(out, fmha.memory_efficient_attention(q, k, k, longer))
    bias.k_seqinfo = new.k_seqinfo
    out = fmha.memory_efficient_attention(q, k, k, bias)
    assert torch.equal(out, fmha.memory_efficient_attention(q, k, k, new))


def test_biases_are_copied_and_pickled() -> None:
    q = drawn(1, 7, 2, 16)
    bias = BlockDiagonalMask.from_seqlens([3, 4], device=CPU).make_causal()
    wanted = fmha.memory_efficient_attention(q, q, q, bias)
    for own in (copy.deepcopy(bias), pickle.loads(pickle.dumps(bias)), bias.to("cpu")):
        assert torch.equal(fmha.memory_efficient_attention(q, q, q, own), wanted)
    meta = bias.to("meta")
    assert meta.q_seqinfo.seqstart.device.type == "meta"
    assert meta.k_seqinfo is meta.q_seqinfo
    paged = PagedBlockDiagonalPaddedKeysMask.from_seqlens([3, 4], [5, 4], TABLE, 4).to("meta")
    assert paged.block_tables.device.type == "meta"
    assert LowerTriangularMask().to("meta").materialize((2, 3), torch.float16).dtype is torch.half
    assert LowerTriangularMask().add_bias(q).to("meta")._bias.device.type == "meta"


def test_refusals() -> None:
    seqs = BlockDiagonalMask.from_seqlens([3, 4], device=CPU)
    gappy = BlockDiagonalGappyKeysMask.from_seqlens([3], [0, 24], [5], device=CPU)
    values: dict[str, Callable[[], object]] = {
        "window_size=0": lambda: LowerTriangularFromBottomRightLocalAttentionMask(0),
        "window_left=-1": lambda: LocalAttentionFromBottomRightMask(-1, 0),
        "window_right=-2": lambda: BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(
            [3], 8, [5], 0, -2
        ),
        "sequence 1 has 4 queries and 3 keys": lambda: BlockDiagonalMask.from_seqlens(
            [3, 4], [5, 3], device=CPU
        ).make_causal_from_bottomright(),
        "seqstarts has 1 entries": lambda: BlockDiagonalGappyKeysMask.from_seqlens([3], [0], [5]),
        "notional_padding=10": lambda: gappy.make_paged(
            TABLE[:1], 4, 10, PagedBlockDiagonalGappyKeysMask
        ),
        r"must be \[1, 7, …\]": lambda: seqs.split(drawn(1, 6, 2, 16)),
        "shape=": lambda: seqs.materialize((7, 8)),
    }
    for message, call in values.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert isinstance(caught.value, jitattn.InvalidInputError)
    with pytest.raises(RuntimeError, match="see none"):
        BlockDiagonalMask.from_seqlens([9], [3], device=CPU).make_local_attention(2)
    asserted: dict[str, Callable[[], object]] = {
        "a list of ints": lambda: _SeqLenInfo.from_seqlens(torch.tensor([3])),
        "larger than the padding": lambda: _PaddedSeqLenInfo.from_seqlens_padded([9], 8),
        "both need one": lambda: BlockDiagonalMask.from_seqlens([3], [3, 4]),
        "in place": lambda: seqs.q_seqinfo.from_seqlens_inplace([5, 2]),
        "2 sequences": lambda: seqs.q_seqinfo.from_seqlens_inplace([5]),
        "all need one": lambda: PagedBlockDiagonalPaddedKeysMask.from_seqlens([3], [5], TABLE, 4),
        "must lie in": lambda: gappy.make_paged(
            TABLE[:1, :1], 4, 24, PagedBlockDiagonalGappyKeysMask
        ),
    }
    for message, call in asserted.items():
        with pytest.raises(AssertionError, match=message):
            call()
    local = BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local([3], 8, [5], 2)
    for call in (
        lambda: _PaddedSeqLenInfo.from_seqlens([3]),
        lambda: _GappySeqInfo.from_seqlens([3]),
        lambda: local.k_seqinfo.split(drawn(1, 8, 2, 16)),
        lambda: gappy.k_seqinfo.split(drawn(1, 24, 2, 16)),
    ):
        with pytest.raises(NotImplementedError):
            call()

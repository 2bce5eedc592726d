"""Tests padded, packed and partial sequences of the dkernel door against dense fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jitattn.compat.dkernel import (
    LocalStrideSparseAttention,
    SparseAttention,
    combine_attn_partitions,
    get_sparse_attn_mask,
)
from tests.support.compat_dkernel import SIZE, D, blocks, check, dense, tensors


@pytest.mark.parametrize("kind", ["left", "right", "both"])
@pytest.mark.parametrize("len_q", [100, 1, 30])
def test_paddings(kind: str, len_q: int) -> None:
    left, right = torch.tensor([7, 20]), torch.tensor([85, 60])
    given: dict[str, Any] = {}
    if kind != "right":
        given["left_paddings"] = left
    if kind != "left":
        given["seqlens"] = right if kind == "right" else torch.tensor([80, 41])
    layer = LocalStrideSparseAttention(4, 128, SIZE, 2, 3, num_kv_heads=2)
    q, k, v = tensors(len_q, 100)
    pattern = blocks(4, 8, 8, (2, 1), 3, heads_kv=2)
    truth = torch.zeros_like(q, dtype=torch.float64)
    for b in range(2):
        begin = int(left[b]) if kind != "right" else 0
        length = 100 - begin if kind == "left" else int(given["seqlens"][b])
        rows = slice(begin, begin + length)
        own = rows if len_q == 100 else slice(0, len_q)
        truth[b, own] = dense(q[b, own], k[b, rows], v[b, rows], pattern, SIZE)[0]
    check(layer(q, k, v, **given), truth, [q, k, v])


@pytest.mark.parametrize("kind", ["prompt", "decode", "chunks"])
def test_packed(kind: str) -> None:
    lengths = {"prompt": (30, 70, 1), "decode": (1, 1, 1), "chunks": (5, 33, 1)}[kind]
    histories = (30, 70, 1) if kind == "prompt" else (60, 90, 17)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, histories))
    q, k, v = (x[0].detach() for x in tensors(sum(lengths), sum(histories)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    layer = LocalStrideSparseAttention(4, 128, SIZE, 2, 3, num_kv_heads=2)
    given = {"cu_seqlen_q": cu_q} if kind == "chunks" else {}
    out, lse = layer(q, k, v, cu_seqlen_k=cu_k, return_lse=True, **given)
    pattern = blocks(4, 8, 8, (2, 1), 3, heads_kv=2)
    own = [torch.split(x, n) for x, n in ((q, lengths), (k, histories), (v, histories))]
    truths = [dense(*one, pattern, SIZE) for one in zip(*own, strict=True)]
    check(out, torch.cat([one[0] for one in truths]), leaves)
    torch.testing.assert_close(lse, torch.cat([one[1] for one in truths], 1).float())
    with pytest.raises(ValueError, match="cu_seqlen_q"):
        layer(q[:2], k, v, cu_seqlen_k=cu_k)
    with pytest.raises(AssertionError, match="cu_seqlen_k"):
        layer(q, k, v)


def test_packed_projections() -> None:
    packed = torch.randn(2, 50, 8, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer = LocalStrideSparseAttention(4, 64, SIZE, 1, 2, num_kv_heads=2)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.split((4, 2, 2) if x.shape[2] == 8 else (2, 2), 2)

    q, k, v = split(packed)
    out = layer(q, k, v)
    assert torch.equal(layer(packed, split_qkv=split), out)
    assert torch.equal(layer(q, packed[:, :, 4:], split_qkv=split), out)
    (gradient,) = torch.autograd.grad(layer(packed, split_qkv=split).sum(), packed)
    assert gradient.shape == packed.shape
    with pytest.raises(AssertionError, match="split_qkv"):
        layer(packed)


@pytest.mark.parametrize("seq_dim", [1, 2])
def test_partitions_of_a_sequence(seq_dim: int) -> None:
    """As in ring attention: a part of the queries against one part of the keys after another."""
    chunk, count = 32, 3
    q, k, v = tensors(chunk * count, chunk * count, (3, 3))
    whole = LocalStrideSparseAttention(3, 96, SIZE, 2, 4)(q, k, v)
    moved = [x if seq_dim == 1 else x.transpose(1, 2) for x in (q, k, v)]
    parts = [x.chunk(count, dim=seq_dim) for x in moved]
    combined = []
    for i in range(count):
        results = []
        for j in range(i + 1):
            mask = get_sparse_attn_mask(3, chunk, SIZE, 2, 4, q_start_position=i * chunk,
                                        kv_start_position=j * chunk)[1]  # fmt: skip
            layer = SparseAttention(SIZE, mask, seq_dim=seq_dim, causal=i == j)
            results.append(layer(parts[0][i], parts[1][j], parts[2][j], return_lse=True))
        combined.append(combine_attn_partitions(*results, hdim=3 - seq_dim))
    out = torch.cat(combined, dim=seq_dim)
    check(out if seq_dim == 1 else out.transpose(1, 2), whole.double(), [q, k, v])


def test_partitions_of_unequal_length() -> None:
    """The last queries against two short parts of what is before them, and against themselves."""
    q, k, v = tensors(128, 128, (3, 3))
    whole = LocalStrideSparseAttention(3, 128, SIZE, 2, 4)(q, k, v)[:, 64:]
    results = []
    for first, last in ((0, 32), (32, 64), (64, 128)):
        mask = get_sparse_attn_mask(3, 64, SIZE, 2, 4, kv_seqlen=last - first, q_start_position=64,
                                    kv_start_position=first)[1]  # fmt: skip
        layer = SparseAttention(SIZE, mask, causal=first == 64)
        parts = (q[:, 64:], k[:, first:last], v[:, first:last])
        results.append(layer(*parts, return_lse=True))
    check(combine_attn_partitions(*results, hdim=2), whole.double(), [q, k, v])

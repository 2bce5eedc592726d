"""The door of dkernel, against dense fp64 of its documented semantics."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn.compat.dkernel import (
    LocalStrideSparseAttention,
    SparseAttention,
    combine_attn_partitions,
    get_sparse_attn_mask,
    utils,
)
from tests.support.compare import rel_l2
from tests.support.compat_dkernel import blocks, dense, first_row

D, SIZE = 16, 16


def tensors(
    len_q: int, len_kv: int, heads: tuple[int, int] = (4, 2), seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, len_q, heads[0], D), (2, len_kv, heads[1], D), (2, len_kv, heads[1], D))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def check(
    result: Tensor, truth: Tensor, leaves: list[Tensor], lses: tuple[Tensor, Tensor] | None = None
) -> None:
    """Values, and gradients of all leaves; with LSEs, ours and true ones, through both."""
    assert result.shape == truth.shape
    assert rel_l2(result, truth) < 1e-5
    results, truths = [result], [truth]
    if lses is not None:
        torch.testing.assert_close(lses[0], lses[1].float())
        results.append(lses[0])
        truths.append(lses[1])
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(x.shape, generator=generator) for x in truths]
    got = torch.autograd.grad(results, leaves, given)
    wanted = torch.autograd.grad(truths, leaves, [x.double() for x in given])
    for one, other in zip(got, wanted, strict=True):
        assert rel_l2(one, other) < 1e-4


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


def _compile_cases() -> dict[str, tuple[SparseAttention, tuple[int, int], dict[str, Any]]]:
    pattern = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.7
    paddings = {"left_paddings": torch.tensor([0, 9]), "seqlens": torch.tensor([60, 40])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        square = SparseAttention(SIZE, pattern)
        return {
            "square": (square, (60, 60), {"return_lse": True}),
            "padded": (square, (60, 60), paddings),
            "more queries": (
                SparseAttention(SIZE, pattern, causal=False),
                (60, 20),
                {"sm_scale": 0.3},
            ),
            "moved": (SparseAttention(SIZE, pattern[:, :2]), (30, 60), {"return_lse": True}),
            "cut": (SparseAttention(256, pattern[:, :2, :2]), (300, 300), {}),
            "closed": (LocalStrideSparseAttention(4, 64, SIZE, 1, 3, num_kv_heads=2), (60, 60), {}),
            "written": (LocalStrideSparseAttention(4, 64, SIZE, 1, 3), (60, 60), {}),
        }


@pytest.mark.parametrize("name", list(_compile_cases()))
def test_one_graph_with_the_same_results(name: str) -> None:
    layers = [_compile_cases()[name][0] for _ in range(2)]  # of one kind, as in a model
    _, (len_q, len_kv), given = _compile_cases()[name]

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        found = [layer(q, k, v, **given) for layer in layers]
        return tuple(x for one in found for x in (one if isinstance(one, tuple) else (one,)))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    # Again with what the first call made, or with other lengths.
    for fewer in (0, 0 if name in ("padded", "cut", "written") else 5):
        leaves = tensors(len_q - fewer, len_kv - fewer)
        results = []
        for call in (compiled, function):
            values = call(*leaves)
            weights = [torch.cos(torch.arange(x.numel()) / 7).view(x.shape) for x in values]
            results.append((*values, *torch.autograd.grad(values, leaves, weights)))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)


def test_one_graph_of_packed_sequences() -> None:
    layer = SparseAttention(SIZE, torch.ones(4, 4).tril())
    q, k, v = (x[0].detach().requires_grad_() for x in tensors(50, 50))
    ends = torch.tensor([0, 20, 50])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, wanted = (call(q, k, v, cu_seqlen_k=ends) for call in (compiled, layer))
    torch.testing.assert_close(got, wanted)
    gradients = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (got, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_pattern_that_is_written_to() -> None:
    for pattern, lengths in ((torch.ones(4, 4).tril(), (60, 60)), (torch.ones(2, 4), (30, 60))):
        layer = SparseAttention(SIZE, pattern)
        leaves = [x.detach() for x in tensors(*lengths)]
        layer(*leaves)
        layer.sparse_pattern[:, :, 0] = False
        torch.testing.assert_close(
            layer(*leaves), SparseAttention(SIZE, layer.sparse_pattern)(*leaves)
        )


def test_modules_move_and_cast() -> None:
    layer = SparseAttention(SIZE, torch.ones(2, 2).tril())
    layer.to(torch.float16)
    assert layer.sparse_pattern.dtype is torch.bool
    assert not layer.state_dict()
    q, k, v = tensors(32, 32)
    with torch.no_grad():
        room = torch.empty_like(q)
        writes = SparseAttention(
            SIZE, torch.ones(2, 2).tril(), out=room, d_splits=2, inference=True
        )
        assert writes(q, k, v) is room
    torch.testing.assert_close(room, layer(q, k, v))
    assert torch.equal(layer(q, k, v, 0), layer(q, k, v))  # 0 is the default scale


def test_what_the_original_asserts() -> None:
    pattern = torch.ones(4, 4).tril()
    for size in (8, 24, 16.0, 0, None):
        with pytest.raises(AssertionError, match="power of two"):
            SparseAttention(size, pattern)
    with pytest.raises(AssertionError, match="rows, columns"):
        SparseAttention(SIZE, pattern[0])
    with pytest.raises(AssertionError, match="sparse_pattern is a list"):
        SparseAttention(SIZE, [[1]])
    with pytest.raises(AssertionError, match="not causal"):
        SparseAttention(SIZE, pattern, causal=False, block_m=64)
    with pytest.raises(AssertionError, match="divide"):
        SparseAttention(SIZE, pattern, block_n=32)
    with pytest.raises(AssertionError, match="seq_dim"):
        SparseAttention(SIZE, pattern, seq_dim=3)
    with pytest.raises(jitattn.InvalidInputError, match="no such argument"):
        SparseAttention(SIZE, pattern, max_length=3)
    layer = SparseAttention(SIZE, pattern)
    with pytest.raises(AssertionError, match="room for 64"):
        layer(*tensors(100, 100))
    with pytest.raises(AssertionError, match="3 heads"):
        SparseAttention(SIZE, torch.ones(3, 4, 4))(*tensors(50, 50))
    with pytest.warns(UserWarning, match="can drop nothing"):
        SparseAttention(
            SIZE, torch.eye(4) + torch.tensor([[0.0], [0], [1], [0]]) * (torch.arange(4) == 0)
        )
    wrongs: tuple[dict[str, Any], ...] = (
        {"vert_stride": 0},
        {"vert_stride": 2.5},
        {"local_blocks": 0},
        {"local_blocks": (1, 1)},
        {"local_blocks": -1, "vert_stride": 1},
        {"num_kv_heads": 3},
        {"num_kv_heads": 8},
        {"num_kv_heads": -2},
        {"num_dense_heads": -1},
        {"num_dense_heads": 1, "homo_head": True},
        {"local_blocks": -1, "causal": False},
        {"local_blocks": (1, 0), "causal": False},
    )
    for wrong in wrongs:
        given = {"local_blocks": 2, "vert_stride": 3} | wrong
        for make in (
            lambda given=given: LocalStrideSparseAttention(4, 128, SIZE, **given),
            lambda given=given: get_sparse_attn_mask(4, 128, SIZE, **given),
        ):
            with pytest.raises(AssertionError, match=f"{next(iter(wrong))}="):
                make()
    for part in ((1, 2, 3), (2, 2), (-1, 2), (2, 5)):
        with pytest.raises(AssertionError, match="active_head_range="):
            LocalStrideSparseAttention(4, 128, SIZE, 2, 3, active_head_range=part)
    for given in ({"vert_position_type": "up"}, {"past_len": 5, "q_start_position": 16},
                  {"q_start_position": 5}, {"past_len": 65}, {"past_len": -1}):  # fmt: skip
        with pytest.raises(AssertionError, match=f"{next(iter(given))}="):
            get_sparse_attn_mask(4, 64, SIZE, **given)


def test_calls_that_do_not_fit() -> None:
    layer = SparseAttention(SIZE, torch.ones(4, 4).tril())
    q, k, v = (x.detach() for x in tensors(50, 50))
    flat = (q[0], k[0], v[0])
    ends = torch.tensor([0, 20, 50])

    def one(*values: int) -> Tensor:
        return torch.tensor(values)

    cases: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((q, k, v[:, :40]), {}, "same batch, length and heads"),
        ((q, k[:1], v[:1]), {}, "same batch and head dim"),
        ((q, k[..., :8], v), {}, "same batch and head dim"),
        ((q[:, :, :3], k, v), {}, "check seq_dim"),
        ((q[0], k, v), {}, "must be 4-D, or 3-D"),
        ((q, k, v), {"cu_seqlen_k": ends}, "cu_seqlen_k is given and q is 4-D"),
        (flat, {"cu_seqlen_k": ends, "seqlens": ends}, "seqlens is given and q is 3-D"),
        (flat, {"cu_seqlen_k": ends, "cu_seqlen_q": ends[:2]}, "cu_seqlen_q has 2 entries"),
        (flat, {"cu_seqlen_k": ends[:0]}, "cu_seqlen_k has 0 entries"),
        (flat, {"cu_seqlen_k": one(0, 70)}, "a sequence of 70 tokens"),
        ((q, k, v), {"seqlens": ends}, "seqlens has 3 entries"),
        ((q, k, v), {"seqlens": one(50, 51)}, r"^seqlens\[1\]=51: "),
        ((q, k, v), {"seqlens": one(-1, 50)}, r"^seqlens\[0\]=-1: "),
        ((q, k, v), {"left_paddings": one(5, 51)}, r"^left_paddings\[1\]=51: "),
        (
            (q, k, v),
            {"left_paddings": one(5, 3).int(), "seqlens": one(45, 48)},
            r"^left_paddings\[1\]=3 and seqlens\[1\]=48: ",
        ),
    ]
    for given, arguments, message in cases:
        with pytest.raises(AssertionError, match=message) as caught:
            layer(*given, **arguments)
        assert isinstance(caught.value, jitattn.InvalidInputError)
    for given, arguments, message in (
        (flat, {"cu_seqlen_k": ends.float()}, "cu_seqlen_k is torch.float32"),
        (flat, {"cu_seqlen_k": [0, 50]}, "cu_seqlen_k is a list"),
        ((q, k, v), {"left_paddings": ends[None]}, "left_paddings has shape"),
        ((q, k, v), {"sm_scale": torch.tensor(0.3)}, "sm_scale is a Tensor"),
        ((q.numpy(), k, v), {}, "q is a ndarray"),
        ((q, k.half(), v), {}, "must have one dtype"),
    ):
        with pytest.raises(jitattn.InvalidInputError, match=message):
            layer(*given, **arguments)
    assert layer(q, k, torch.randn(2, 50, 2, 24)).shape == (2, 50, 4, 24)


def test_what_cannot_be_combined() -> None:
    out, lse = torch.zeros(2, 30, 4, D), torch.zeros(2, 4, 30)
    assert combine_attn_partitions((out, lse), hdim=2).shape == out.shape
    for wrong, what in (
        ((), "no parts"),
        ((out, lse), "part 0 is a Tensor"),
        (((out.transpose(1, 2), lse), (out, None)), "part 1 is a tuple"),
        (((out, lse),), "results of seq_dim=1 need hdim=2"),
    ):
        with pytest.raises(AssertionError, match=what):
            combine_attn_partitions(*wrong)
    with pytest.raises(AssertionError, match="hdim=3"):
        combine_attn_partitions((out, lse), hdim=3)


@pytest.mark.parametrize("causal", [True, False])
def test_dense_without_local_blocks(causal: bool) -> None:
    q, k, v = (x.detach() for x in tensors(50, 50))
    mask: jitattn.Mask = jitattn.Causal() if causal else jitattn.Full()
    layer = LocalStrideSparseAttention(4, 64, SIZE, 0, 1, num_kv_heads=2, causal=causal)
    torch.testing.assert_close(layer(q, k, v), jitattn.attention(q, k, v, mask=mask))
    assert torch.equal(layer.sparse_pattern[0], layer.sparse_pattern[0].new_ones(4, 4).tril()
                       if causal else layer.sparse_pattern[0].new_ones(4, 4))  # fmt: skip


def test_utilities() -> None:
    pattern = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]])
    crow, col = utils.dense_to_crow_col(pattern)
    assert crow.tolist() == [[0, 1, 3, 5], [0, 1, 2, 3]]
    assert col.tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, -1, -1]]
    assert torch.equal(utils.crow_col_to_dense(crow, col, torch.int64), pattern)
    ccol, row = utils.dense_to_ccol_row(pattern)
    assert torch.equal(utils.ccol_row_to_dense(ccol, row, torch.int64), pattern)
    flat, flat_col = utils.dense_to_crow_col(pattern[0])
    assert torch.equal(utils.crow_col_to_dense(flat, flat_col, torch.int64), pattern[0])
    values = utils.dense_to_crow_col(pattern * 5, include_values=True)
    assert values[1].shape == (2, 5, 2)
    assert torch.equal(utils.crow_col_to_dense(*values, torch.int64), pattern * 5)
    assert utils.is_causal(pattern)
    assert not utils.is_causal(pattern.transpose(1, 2))
    assert utils.is_kv_cache_efficient(pattern, 16, 16)
    assert not utils.is_kv_cache_efficient(
        torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]]), 16, 16
    )
    assert list(utils.get_q_block_ids(20, 30, 16)) == [1, 2, 3]
    assert utils.multiple_of(17, 16) == 32
    assert utils.zero_stride(torch.ones(1, 3)).stride() == (0, 1)
    with pytest.raises(AssertionError, match="at most 1"):
        utils.zero_stride(torch.ones(2, 3))
    utils.verify_sparse_pattern(pattern)
    # Kernel blocks: the pattern's own, halves of its keys, and two of its rows in one.
    square = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]]])
    same = utils.merge_split_fwd_kernel_blocks(32, square, 32, 32)
    assert torch.equal(utils.crow_col_to_dense(*same, torch.int64), square)
    halves = utils.crow_col_to_dense(
        *utils.merge_split_fwd_kernel_blocks(32, square, 32, 16), torch.int64
    )
    assert torch.equal(halves, square.repeat_interleave(2, 2))
    quarters = utils.crow_col_to_dense(
        *utils.merge_split_fwd_kernel_blocks(32, square, 16, 16), torch.int64
    )
    assert torch.equal(quarters, square.repeat_interleave(2, 1).repeat_interleave(2, 2).tril())
    merged = utils.merge_split_fwd_kernel_blocks(32, square, 64, 32)
    assert utils.crow_col_to_dense(*merged, torch.int64).tolist() == [
        [[64, 64, 0, 0], [64, 32, 64, 64]]
    ]
    with pytest.raises(AssertionError, match="block_n"):
        utils.merge_split_fwd_kernel_blocks(32, square, 32, 64)

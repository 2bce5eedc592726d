"""Tests modules of the dkernel door: compiled, moved, modified, and their errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import jitattn
from jitattn.compat.dkernel import (
    LocalStrideSparseAttention,
    SparseAttention,
    _module,
    combine_attn_partitions,
    get_sparse_attn_mask,
    utils,
)
from tests.support.compat_dkernel import SIZE, D, tensors


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


@pytest.mark.parametrize("name", ["square", "closed"])
def test_traced_with_symbolic_sizes(name: str) -> None:
    layer = _compile_cases()[name][0]
    q, k, v = tensors(60, 60)
    graph = make_fx(lambda *own: layer(*own), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        q, k, v
    )
    torch.testing.assert_close(graph(q, k, v), layer(q, k, v))


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


def test_what_is_kept_of_shapes_is_of_the_module_as_it_is() -> None:
    """Another dimension, pattern, or kind of argument counts at once, with shapes seen before."""
    q, k, v = (x.detach() for x in tensors(32, 32))
    layer = LocalStrideSparseAttention(4, 64, SIZE, 2, 3, num_kv_heads=2)
    before = layer(q, k, v)
    with pytest.raises(jitattn.InvalidInputError, match="k is a ndarray"):
        layer(q, k.numpy(), v)
    layer.seq_dim = 2
    with pytest.raises(AssertionError, match="check seq_dim, which is 2"):
        layer(q[:, :3], k[:, :2], v[:, :2])
    turned = layer(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(turned.transpose(1, 2), before)
    with pytest.raises(AssertionError, match="the pattern has room for 64"):
        layer(*(x.transpose(1, 2).repeat(1, 1, 3, 1) for x in (q, k, v)))

    own = SparseAttention(SIZE, torch.ones(2, 2, dtype=torch.bool).tril())
    own(q, k, v)
    own.sparse_pattern = torch.ones(3, 2, 2, dtype=torch.bool).tril()
    with pytest.raises(AssertionError, match="the pattern has 3 heads"):
        own(q, k, v)


def test_shapes_are_kept_within_bounds() -> None:
    layer = LocalStrideSparseAttention(4, 512, SIZE, 2, 3, num_kv_heads=2)
    q, k, v = (x.detach() for x in tensors(1, 300))
    for length in range(1, 300):
        layer(q, k[:, :length], v[:, :length])
    assert 0 < len(layer._facts) <= _module._MOST_FACTS

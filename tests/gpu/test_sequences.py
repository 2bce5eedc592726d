"""Tests random sequence layouts against the reference, and decoding in a graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given

import jitattn
from jitattn import Causal, Full, Padded, Paged, Ragged
from jitattn.jit import build
from jitattn.plan import forward
from jitattn.request.request import forget_requests
from jitattn.spec.enums import SeqLayout
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.layouts import KINDS, LayoutCase, check_layout, layout_cases
from tests.support.precompile import CompileOnce, forward_specs
from tests.support.random_cases import cases, check_part, in_parts

BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def _compiled(arch: str, compile_once: CompileOnce) -> None:
    """Compile in parallel all kernels that the random cases can need."""
    layouts = itertools.product((SeqLayout.BATCHED, SeqLayout.RAGGED), SeqLayout)
    batched = (SeqLayout.BATCHED, SeqLayout.BATCHED)
    specs = forward_specs(KINDS, [pair for pair in layouts if pair != batched], arch)
    assert len(specs) <= 150
    assert compile_once(specs) == []


@pytest.fixture(scope="module", autouse=True)
def _merges_cost_nothing() -> Iterator[None]:
    """Balance short sequences as well, whose merges would take longer than their keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "combine_cost", lambda _: 0.0)
        forget_requests()
        yield
    forget_requests()


@cases(150)
@given(layout_cases())
def test_random_layouts(case: LayoutCase) -> None:
    check_layout(case, "cuda")


@pytest.mark.usefixtures("full_grid")
@in_parts
def test_many_random_layouts(part: int) -> None:
    check_part(part, 2000, layout_cases(), lambda case: check_layout(case, "cuda"))


def paged_inputs(
    lengths: list[int], room: int, page_size: int = 16, dim: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Paged]:
    """A decode call: one query a sequence, pages in random order, room for `room` keys each."""
    batch, width = len(lengths), -(-room // page_size)
    pages = torch.randn(batch * width, 2, page_size, 2, dim, device="cuda", dtype=BF16)
    table = torch.randperm(batch * width, device="cuda").reshape(batch, width).int()
    length = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    q = torch.randn(batch, 1, 8, dim, device="cuda", dtype=BF16)
    return q, pages[:, 0], pages[:, 1], Paged(table, length)


@pytest.mark.real_gpu
def test_decode_in_a_graph_while_lengths_grow() -> None:
    q, k, v, seqs = paged_inputs([1, 700, 33, 0], 3000)
    jitattn.attention(q, k, v, kv_seqs=seqs)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v, kv_seqs=seqs)
    for step in (0, 1, 15, 400, 2200):
        seqs.length.copy_(torch.tensor([1 + step, min(3000, 700 + step), 33 + step, step]))
        graph.replay()
        truth = jitattn.reference.reference(q, k, v, kv_seqs=seqs)
        assert rel_l2(out, truth) < 5e-3
        assert torch.equal(out, jitattn.attention(q, k, v, kv_seqs=seqs))


@pytest.mark.real_gpu
def test_nothing_compiles_when_lengths_and_tables_change() -> None:
    for size in (16, 1):  # pages of a multiple of 16 keys have kernels of their own
        q, k, v, seqs = paged_inputs([100, 200], 1000, size)
        jitattn.warmup(q, k, v, kv_seqs=seqs)
    compiled = build.stats().compiled
    for step in range(100):
        batch = 1 + step % 5
        lengths = [1 + (step * 37 + 101 * idx) % 900 for idx in range(batch)]
        size = (16, 32, 1)[step % 3]
        q, k, v, seqs = paged_inputs(lengths, 1000, size)
        jitattn.attention(q, k, v, kv_seqs=seqs)
    assert build.stats().compiled == compiled


def test_same_bits_in_a_bigger_batch_with_fixed_splits() -> None:
    q, k, v, seqs = paged_inputs([900, 5, 450, 77], 1000)
    whole = jitattn.attention(q, k, v, kv_seqs=seqs, num_splits=4)
    for idx in range(4):
        one = Paged(seqs.block_table[idx : idx + 1], seqs.length[idx : idx + 1])
        alone = jitattn.attention(q[idx : idx + 1], k, v, kv_seqs=one, num_splits=4)
        assert torch.equal(alone[0], whole[idx])


@pytest.mark.real_gpu
def test_runs_are_bitwise_reproducible() -> None:
    q, k, v, seqs = paged_inputs([3000, 5, 450, 2999], 3000)
    first = jitattn.attention(q, k, v, kv_seqs=seqs)
    for _ in range(50):
        assert torch.equal(jitattn.attention(q, k, v, kv_seqs=seqs), first)


def test_indices_that_lead_out_read_nothing() -> None:
    """Contents are not checked on a GPU; but no read leaves the tensors (memcheck)."""
    q, k, v, seqs = paged_inputs([100, 200], 1000)
    seqs.block_table.fill_(2**31 - 1)
    seqs.length.fill_(10**6)
    jitattn.attention(q, k, v, kv_seqs=seqs)
    start = torch.tensor([-5, 10**9], device="cuda", dtype=torch.int32)
    flat = torch.randn(50, 2, 64, device="cuda", dtype=BF16)
    wrong = Ragged(start, start.abs(), max_length=50)
    jitattn.attention(flat, flat, flat, q_seqs=wrong, kv_seqs=wrong).cpu()  # waits for both


@pytest.mark.real_gpu
def test_unknown_length_is_refused_during_capture() -> None:
    flat = torch.randn(50, 2, 64, device="cuda", dtype=BF16)
    start = torch.tensor([0, 20], device="cuda", dtype=torch.int32)
    known = Ragged(start, start + 5, max_length=25)
    jitattn.attention(flat, flat, flat, q_seqs=known, kv_seqs=known, mask=Causal())
    unknown = Ragged(start, start + 5)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        with pytest.raises(jitattn.InvalidInputError, match="give max_length"):
            jitattn.attention(flat, flat, flat, q_seqs=unknown, kv_seqs=unknown, mask=Causal())
        out = jitattn.attention(flat, flat, flat, q_seqs=known, kv_seqs=known, mask=Causal())
    graph.replay()
    truth = jitattn.attention(flat, flat, flat, q_seqs=unknown, kv_seqs=unknown, mask=Causal())
    assert torch.equal(out, truth)


def test_key_lengths_of_a_batched_cache() -> None:
    q = torch.randn(3, 1, 8, 64, device="cuda", dtype=BF16)
    cache = torch.full((3, 500, 2, 64), float("nan"), device="cuda", dtype=BF16)
    lengths = torch.tensor([0, 499, 130], device="cuda")
    for idx, length in enumerate(lengths.tolist()):
        cache[idx, :length] = torch.randn(length, 2, 64)
    out = jitattn.attention(q, cache, cache, mask=Full(), kv_seqs=Padded(lengths))
    truth = jitattn.reference.reference(q, cache, cache, kv_seqs=Padded(lengths))
    assert rel_l2(out, truth) < 5e-3
    assert torch.equal(out[0], torch.zeros_like(out[0]))


@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_a_long_sequence_among_short_ones(num_splits: int | None) -> None:
    """No more tiles than rows fill, one for each sequence aside, whatever the bound is."""
    lengths = [1] * 20 + [300] + [0, 17] * 10
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    q, k, v = (
        torch.randn(sum(lengths), heads, 64, device="cuda", dtype=BF16) for heads in (4, 2, 2)
    )
    seqs = Ragged.from_cu_seqlens(cu, max_length=sum(lengths))
    given = {"q_seqs": seqs, "kv_seqs": seqs, "mask": Causal(), "num_splits": num_splits}
    out = jitattn.attention(q, k, v, **given)
    truth = jitattn.reference.reference(q, k, v, q_seqs=seqs, kv_seqs=seqs, mask=Causal())
    assert rel_l2(out, truth) < 5e-3
    if num_splits is not None:
        tiles = sum(lengths) // 64 + len(lengths)  # of 64 rows or more, of 4 heads
        assert jitattn.explain(q, k, v, **given).num_ctas <= 4 * tiles * num_splits


@pytest.mark.parametrize("page", [16, 5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pages_take_cumulative_lengths(page: int, dtype: torch.dtype) -> None:
    pages = torch.randn(2, 60 // page * 3, page, 2, 64, device="cuda", dtype=BF16)
    table = torch.randperm(pages.shape[1], device="cuda").reshape(3, -1).int()
    lengths = torch.tensor([21, 0, 37], dtype=dtype, device="cuda")
    cumulative = torch.tensor([9, 30, 30, 67], dtype=dtype, device="cuda")
    q = torch.randn(3, 2, 4, 64, device="cuda", dtype=BF16)
    found = [
        jitattn.attention(q, *pages, mask=Causal(), kv_seqs=seqs, return_lse=True)
        for seqs in (Paged.from_cu_seqlens(table, cumulative), Paged(table, lengths))
    ]
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)
    assert not found[0][0][1].any()

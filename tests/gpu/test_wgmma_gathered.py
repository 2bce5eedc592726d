"""Tests the wgmma kernels of sm_90 with keys in pages, block lists, and packed query heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import jitattn
from jitattn import BlockSparse, Causal, Full, Paged, Ragged, Window
from tests.support.wgmma import BF16, check, drawn

pytestmark = pytest.mark.usefixtures("wgmma_family")
DIMS = [64, 96, 128, 256]


def in_pages(
    lengths: list[int], page_size: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, Paged]:
    """Return pages of k and v, in any order, whose rows without a key are no numbers."""
    width = -(-max(lengths) // page_size) + 1
    order = torch.randperm(len(lengths) * width).tolist()
    k, v = (
        torch.full((len(order), page_size, 2, dim), math.nan, device="cuda", dtype=BF16)
        for _ in range(2)
    )
    table = torch.full((len(lengths), width), 10**6, dtype=torch.int32)  # no such page
    for row, length in enumerate(lengths):
        for i in range(-(-length // page_size)):
            page = table[row, i] = order.pop()
            count = min(page_size, length - i * page_size)
            k[page, :count] = drawn(count, 2, dim)
            v[page, :count] = drawn(count, 2, dim)
    return k, v, Paged(table.cuda(), torch.tensor(lengths, device="cuda", dtype=torch.int32))


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(100, 0, keep_first=5)], ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
def test_pages(page_size: int, dim: int, mask: Any) -> None:
    k, v, seqs = in_pages([300, 17, 0, 128], page_size, dim)
    out = check(drawn(4, 140, 4, dim), k, v, mask=mask, kv_seqs=seqs)
    assert out.isfinite().all()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dim", [64, 128])
def test_pages_of_ragged_queries(dim: int, num_splits: int) -> None:
    k, v, seqs = in_pages([500, 17, 300], 32, dim)
    q_seqs = Ragged.from_cu_seqlens(torch.tensor([0, 200, 217, 500], device="cuda").int(), 283)
    given = {"q_seqs": q_seqs, "kv_seqs": seqs, "num_splits": num_splits}
    check(drawn(500, 4, dim), k, v, mask=Causal(), **given)


def test_other_pages_stay_with_mma() -> None:
    k, v, seqs = in_pages([300, 70], 24, 128)
    q = drawn(2, 140, 4, 128)
    record = jitattn.explain(q, k, v, kv_seqs=seqs)
    assert record.kernel["family"] == "fwd"
    assert any("multiples of 16" in reason for reason in record.why)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("lengths", [(500, 500), (130, 490), (490, 130)], ids=str)
def test_block_lists(lengths: tuple[int, int], dim: int) -> None:
    len_q, len_kv = lengths
    q = drawn(2, len_q, 4, dim)
    k, v = (drawn(2, len_kv, 2, dim) for _ in range(2))
    torch.manual_seed(len_q)
    by_head = BlockSparse(torch.rand(4, 8, 8, device="cuda") < 0.5, block_size=64)
    check(q, k, v, mask=by_head)
    fine = BlockSparse(torch.rand(64, 64, device="cuda") < 0.3, block_size=8, causal=True)
    check(q, k, v, mask=fine)
    check(q, k, v, mask=fine, num_splits=2)


@pytest.mark.parametrize("dim", DIMS)
def test_ragged_block_lists(dim: int) -> None:
    """Neighbours change no bit: neither rows before the first query, nor behind the last."""
    mask = BlockSparse(torch.rand(8, 8, device="cuda") < 0.5, block_size=64, causal=True)
    ends = torch.tensor([0, 333, 340, 700], device="cuda", dtype=torch.int32)
    seqs = Ragged.from_cu_seqlens(ends, 360)
    q, k, v = drawn(700, 4, dim), drawn(700, 2, dim), drawn(700, 2, dim)
    given = {"mask": mask, "num_splits": 1}
    out = check(q, k, v, q_seqs=seqs, kv_seqs=seqs, **given)
    alone = Ragged.from_cu_seqlens(ends[2:] - ends[2], 360)
    own = [x[340:].clone() for x in (q, k, v)]
    assert torch.equal(out[340:], check(*own, q_seqs=alone, kv_seqs=alone, **given))


def test_paged_block_lists() -> None:
    mask = BlockSparse(torch.rand(8, 8, device="cuda") < 0.5, block_size=64, causal=True)
    k, v, seqs = in_pages([300, 17, 450], 16, 128)
    check(drawn(3, 140, 4, 128), k, v, mask=mask, kv_seqs=seqs)


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(40, 0, keep_first=3)], ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("group", [2, 4, 8, 64])
def test_packed_heads(group: int, dim: int, mask: Any) -> None:
    """Tiles hold several heads of few queries."""
    len_q = 210 // group
    q = drawn(2, len_q, 2 * group, dim)
    k, v = (drawn(2, 300, 2, dim) for _ in range(2))
    check(q, k, v, mask=mask)
    check(q, k, v, mask=mask, num_splits=2)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    check(heads_first, k, v, mask=mask)


def test_groups_that_do_not_divide_a_copy() -> None:
    q, k = drawn(1, 250, 6, 128), drawn(1, 400, 2, 128)
    check(q, k, k)


def test_packed_and_ragged() -> None:
    ends = torch.tensor([0, 20, 21, 60], device="cuda", dtype=torch.int32)
    seqs = Ragged.from_cu_seqlens(ends, 39)
    k, v, kv_seqs = in_pages([300, 17, 450], 16, 128)
    check(drawn(60, 8, 128), k, v, mask=Causal(), q_seqs=seqs, kv_seqs=kv_seqs)

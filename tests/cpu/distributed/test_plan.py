"""Tests plans: layouts by the cost of masks, position ids, sharding without a group."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch

import jitattn
from jitattn import BlockSparse, Causal, Full, LocalStride, MaskMod, Ragged, Window
from jitattn.distributed import balance, context_parallel_attention, plan, shard, unshard
from jitattn.distributed.members import Members
from jitattn.distributed.pieces import Span
from jitattn.distributed.segments import contiguous, cuts, striped, zigzag
from jitattn.distributed.sharding import Plan
from jitattn.reference import masks


def even(length: int, ranks: int) -> Any:
    ends = cuts(length, ranks)
    return contiguous([b - a for a, b in itertools.pairwise(ends)])


def dealt(mask: Any, length: int = 512, ranks: int = 4, spans: tuple[Span, ...] = ()) -> Any:
    return balance.dealt(mask, length, ranks, even(length, ranks), spans)


@pytest.mark.parametrize("mask", [Full(), Window(20, 0), Window(60, 0), Window(20, 20, 4)], ids=str)
def test_even_work_stays_contiguous(mask: Any) -> None:
    assert dealt(mask) == ("contiguous", even(512, 4))


@pytest.mark.parametrize(
    "mask",
    [Causal(), Window(400, 0), LocalStride(16, 4, 4), MaskMod(lambda b, h, i, j: i >= j)],
    ids=["causal", "window", "stride", "function"],
)
def test_causal_work_is_dealt_from_both_ends(mask: Any) -> None:
    layout, segments = dealt(mask)
    assert layout in ("zigzag", "balanced")
    costs = [_cost(mask, one) for one in segments]
    assert max(costs) / (sum(costs) / 4) < 1.06


def _cost(mask: Any, segments: Any, length: int = 512) -> float:
    """Pairs that the rows of a rank see in the first head, counted one by one."""
    if isinstance(mask, MaskMod):
        mask = Causal()
    seen = masks.attended(mask, 1, 1, 1, length, length)[0, 0]
    rows = [at for one in segments for at in range(one.start, one.stop, one.step)]
    return float(seen.expand(length, length)[rows].sum())


def test_documents_are_balanced_by_tokens_times_keys() -> None:
    spans = (Span(0, 256, 0, 256), *(Span(256 + 8 * i, 8, 256 + 8 * i, 8) for i in range(32)))
    layout, segments = dealt(Full(), spans=spans)
    assert layout != "contiguous"
    seen = torch.zeros(512, 512)
    for one in spans:
        seen[one.q_start : one.q_start + one.q_length,
             one.kv_start : one.kv_start + one.kv_length] = 1  # fmt: skip
    costs = [float(sum(seen[s.start : s.stop].sum() for s in one)) for one in segments]
    contiguous_costs = [float(seen[128 * i : 128 * i + 128].sum()) for i in range(4)]
    assert max(costs) < 0.6 * max(contiguous_costs)


def test_counted_pairs_are_those_of_the_mask() -> None:
    for mask in (Full(), Causal(), Window(9, 3, 2), Window(0, 0)):
        costs = balance._costs(mask, 61, 4, ())
        ends = cuts(61, 4)
        seen = masks.attended(mask, 1, 1, 1, 61, 61)[0, 0].expand(61, 61)
        assert costs == [float(seen[a:b].sum()) for a, b in itertools.pairwise(ends)]


def test_sampled_pairs_follow_a_pattern() -> None:
    pattern = torch.zeros(8, 8, dtype=torch.bool)
    pattern[:2] = True
    costs = balance._costs(BlockSparse(pattern, 64), 512, 8, ())
    assert costs[0] > 0
    assert costs[4:] == [0, 0, 0, 0]
    assert dealt(BlockSparse(pattern, 64))[0] != "contiguous"


def test_position_ids() -> None:
    length, ranks = 61, 3
    for make in (zigzag, striped, even):
        segments = make(length, ranks)
        found = []
        for rank in range(ranks):
            own = _plan_of(length, segments, rank)
            assert own.position_ids.dtype == torch.int64
            assert len(own.position_ids) == own.local_length
            assert torch.equal(shard(torch.arange(length), own, 0), own.position_ids)
            found.append(own.position_ids)
        assert torch.equal(torch.cat(found).sort().values, torch.arange(length))


def _plan_of(length: int, segments: Any, rank: int, spans: tuple[Span, ...] = ()) -> Plan:
    members: Any = type("Members", (), {"rank": rank})()
    return Plan(length, "zigzag", segments, members, spans)


def test_position_ids_of_documents_restart() -> None:
    spans = (Span(2, 5, 2, 5), Span(7, 4, 7, 4))
    own = _plan_of(11, zigzag(11, 1), 0, spans)
    assert own.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_one_process_is_a_plan_of_one_rank() -> None:
    own = plan(Causal(), 9)
    assert (own.ranks, own.rank, own.local_length) == (1, 0, 9)
    x = torch.randn(2, 9, 3)
    assert torch.equal(unshard(shard(x, own), own), x)
    assert plan(Causal(), 9, seqs=Ragged(torch.tensor([0]), torch.tensor([9]))).spans
    q = torch.randn(1, 9, 2, 4)
    found = context_parallel_attention(q, q, q, mask=Causal(), plan=own)
    assert torch.equal(found, jitattn.attention(q, q, q, mask=Causal()))


def test_plans_are_values() -> None:
    own = plan(Causal(), 9)
    again = pickle.loads(pickle.dumps(own))
    assert (again.segments, again.layout) == (own.segments, own.layout)
    with pytest.raises(jitattn.InvalidInputError, match="unpickled"):
        unshard(torch.randn(1, 9), again)
    with pytest.raises(AttributeError, match="frozen"):
        own.length = 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"length": 0}, "length=0"),
        ({"length": 2.5}, "length=2.5"),
        ({"layout": "diagonal"}, "layout='diagonal'"),
        ({"mask": None}, "mask"),
        ({"group": "all"}, "group is a str"),
    ],
)
def test_refused(arguments: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"mask": Causal(), "length": 8, **arguments}
    with pytest.raises(jitattn.InvalidInputError, match=words):
        plan(given.pop("mask"), given.pop("length"), **given)


def test_shards_of_other_lengths_are_refused() -> None:
    own = plan(Causal(), 9)
    for call in (shard, unshard):
        with pytest.raises(jitattn.InvalidInputError, match="8 positions in dim 1"):
            call(torch.randn(1, 8), own)
    with pytest.raises(jitattn.InvalidInputError, match="dim=2"):
        shard(torch.randn(1, 9), own, 2)


def test_members_of_one_process() -> None:
    assert Members(None, None, None).size == 1

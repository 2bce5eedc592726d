"""Tests segments, layouts and pieces of pairs, against every pair looked at by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jitattn.distributed.blocks import Facts, blocks_of, seen_ranges, travelled
from jitattn.distributed.compute import Sums
from jitattn.distributed.heads import head_ranges, read_heads
from jitattn.distributed.pieces import Bounds, Span, pieces_of
from jitattn.distributed.segments import (
    Segment,
    contiguous,
    count_of,
    place_in,
    striped,
    together,
    zigzag,
)


def positions(segment: Segment) -> list[int]:
    return [segment.start + idx * segment.step for idx in range(segment.size)]


def sees(bounds: Bounds, row: int, key: int, span: Span) -> bool:
    shift = span.kv_length - span.q_length if bounds.shift is None else bounds.shift
    at = row + shift
    left = None if bounds.full_on_decode and span.q_length == 1 else bounds.left
    seen = left is None or key >= at - left or key < bounds.keep_first
    return seen and (bounds.right is None or key <= at + bounds.right)


reaches = st.one_of(st.none(), st.integers(0, 9))
segments = st.builds(Segment, st.integers(0, 20), st.integers(1, 9), st.just(1))


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(segments, min_size=1, max_size=2),
    keys=st.lists(segments, min_size=1, max_size=2),
    left=reaches,
    right=reaches,
    keep=st.integers(0, 9),
    shift=st.one_of(st.none(), st.integers(-9, 9)),
    step=st.sampled_from([1, 3]),
    cut=st.integers(0, 20),
)
def test_pieces_are_the_pairs_that_are_seen(
    rows: list[Segment],
    keys: list[Segment],
    left: int | None,
    right: int | None,
    keep: int,
    shift: int | None,
    step: int,
    cut: int,
) -> None:
    rows, keys = ([one._replace(step=step) for one in side] for side in (rows, keys))
    spans = [Span(0, cut, 0, cut + 3), Span(cut, 40, cut + 4, 50)]
    bounds = Bounds(left, right, keep, shift, full_on_decode=cut % 2 == 0)
    flat_rows = [at for one in rows for at in positions(one)]
    flat_keys = [at for one in keys for at in positions(one)]
    found: dict[tuple[int, int], int] = {}
    for piece in pieces_of(rows, keys, bounds, spans):
        assert min(piece.left or 0, piece.right or 0) >= 0
        corner = piece.num_keys - piece.num_rows
        low, high = piece.window
        for i in range(piece.num_rows):
            span = spans[piece.sequence]
            assert flat_rows[piece.row + i] == span.q_start + piece.q_idx + i * step
            for j in range(piece.num_keys):
                assert flat_keys[piece.key + j] == span.kv_start + piece.kv_idx + j * step
                in_left = low is None or j >= i + corner - low
                if in_left and (high is None or j <= i + corner + high):
                    pair = (piece.row + i, piece.key + j)
                    found[pair] = found.get(pair, 0) + 1
                distance = step * (j - i - corner) + piece.corner
                q_idx, kv_idx = piece.q_idx + i * step, piece.kv_idx + j * step
                own = span.kv_length - span.q_length
                assert distance == kv_idx - q_idx - own
    wanted = {
        (i, j)
        for i, row in enumerate(flat_rows)
        for j, key in enumerate(flat_keys)
        for span in spans
        if 0 <= row - span.q_start < span.q_length
        and 0 <= key - span.kv_start < span.kv_length
        and sees(bounds, row - span.q_start, key - span.kv_start, span)
    }
    assert set(found) == wanted
    assert set(found.values()) <= {1}


@pytest.mark.parametrize("length", [1, 2, 7, 16, 61])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_layouts_share_every_position_once(length: int, ranks: int) -> None:
    for shards in (zigzag(length, ranks), striped(length, ranks), contiguous([length])):
        found = sorted(at for shard in shards for one in shard for at in positions(one))
        assert found == list(range(length))
        whole = together(shards)
        assert whole == (Segment(0, length),)
        for shard in shards:
            for one in shard:
                place = place_in(one, whole)
                assert list(range(length))[place.rows] == positions(one)


def test_stripes_of_some_ranks_stay_apart() -> None:
    shards = striped(20, 4)
    assert together(shards[:2]) == (Segment(0, 5, 4), Segment(1, 5, 4))


WINDOW, CAUSAL, FULL = Bounds(8, 0, 2), Bounds(None, 0), Bounds(None, None)


def facts(bounds: Bounds, shards: object, length: int, method: str = "ring") -> Facts:
    spans = (Span(0, length, 0, length),)
    return Facts(shards, shards, bounds, spans, False, False, True, method)  # type: ignore[arg-type]


def test_windows_send_only_what_is_seen() -> None:
    shards = contiguous([32] * 4)
    of_window = [travelled(facts(WINDOW, shards, 128), rank) for rank in range(4)]
    # 8 keys before the shard, and the first 2.
    assert of_window == [(0, 96), (8 + 2, 96), (8 + 2, 96), (8 + 2, 96)]
    of_causal = [travelled(facts(CAUSAL, shards, 128), rank)[0] for rank in range(4)]
    assert of_causal == [0, 32, 64, 96]
    assert travelled(facts(FULL, shards, 128), 0) == (96, 96)


@pytest.mark.parametrize("method", ["ring", "allgather"])
@pytest.mark.parametrize("make", [zigzag, striped])
def test_what_is_sent_is_what_is_expected(method: str, make: object) -> None:
    shards = make(61, 3)  # type: ignore[operator]
    for bounds in (WINDOW, CAUSAL, FULL):
        mine = facts(bounds, shards, 61, method)
        blocks = [blocks_of(mine, rank) for rank in range(3)]
        for reader in range(3):
            for idx in range(1, len(blocks[0])):
                for source in range(3):
                    wanted = [p.rows for p in blocks[reader][idx].parts if p.rank == source]
                    sent = [p.rows for p in blocks[source][idx].sends if p.rank == reader]
                    assert wanted == sent
                    if method == "allgather" and source != reader:
                        assert sorted(sent) == list(seen_ranges(mine, reader, source))


def test_causal_work_is_even_in_zigzag() -> None:
    shards = zigzag(1024, 4)
    mine = facts(CAUSAL, shards, 1024)
    work = [
        sum(
            piece.num_rows * piece.num_keys
            - (piece.num_rows * (piece.num_rows - 1) // 2 if piece.window[1] == 0 else 0)
            for block in blocks_of(mine, rank)
            for launch in block.launches
            for piece in launch.pieces
        )
        for rank in range(4)
    ]
    assert max(work) / min(work) < 1.01


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 1), (9, 3), (12, 6), (32, 8)])
def test_every_head_has_a_rank(heads: tuple[int, int], ranks: int) -> None:
    heads_q, heads_kv = heads
    group = heads_q // heads_kv
    ranges = head_ranges(heads_q, heads_kv, ranks)
    assert [one.first for one in ranges] == [0, *(one.stop for one in ranges[:-1])]
    assert ranges[-1].stop == heads_q
    assert {one.size for one in ranges} <= set(range(1, heads_q + 1))
    for one in ranges:
        assert one.size > 0
        read = range(one.first, one.stop)
        assert {head // group for head in read} == set(range(one.first_kv, one.stop_kv))
        reads = read_heads(one, group)
        if reads is not None:
            assert [one.first_kv + kv for kv in reads] == [head // group for head in read]


def test_count() -> None:
    assert count_of([Segment(0, 3), Segment(9, 4, 2)]) == 7


@pytest.mark.parametrize("bounds", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize("make", [zigzag, striped])
@pytest.mark.parametrize("method", ["ring", "allgather"])
def test_joined_pieces_are_the_same_pairs(bounds: Bounds, make: object, method: str) -> None:
    shards = make(61, 3)  # type: ignore[operator]
    mine = facts(bounds, shards, 61, method)
    for rank in range(3):
        rows = [at for one in shards[rank] for at in positions(one)]
        seen: list[tuple[int, int]] = []
        for block in blocks_of(mine, rank):
            held = rows
            if block.parts:
                of_ranks = [[at for one in shard for at in positions(one)] for shard in shards]
                held = [at for p in block.parts for at in of_ranks[p.rank][slice(*p.rows)]]
            for launch in block.launches:
                (piece,) = launch.pieces
                _, right = launch.window
                corner = piece.num_keys - piece.num_rows
                seen += [
                    (rows[piece.row + i], held[piece.key + j])
                    for i in range(piece.num_rows)
                    for j in range(piece.num_keys)
                    if right is None or j <= i + corner + right
                ]
        wanted = [(i, j) for i in rows for j in range(61) if bounds.right is None or j <= i]
        assert sorted(seen) == sorted(wanted)


def test_a_near_window_is_one_launch() -> None:
    """The keys of others before this rank's own: first ones, then those that the window reaches."""
    mine = facts(WINDOW, contiguous([32] * 4), 128)
    for rank in range(4):
        (block,) = blocks_of(mine, rank)
        (launch,) = block.launches
        (piece,) = launch.pieces
        assert (piece.num_rows, piece.window, piece.keep_first) == (32, (8, 0), 2)
        assert piece.num_keys == 32 + (rank > 0) * 10
        assert [part.rank for part in block.parts] == ([0, rank - 1, rank] if rank > 1 else
                                                       [0, 0, 1][: 1 + 2 * rank])  # fmt: skip


def test_few_launches() -> None:
    mine = facts(CAUSAL, zigzag(64, 2), 64, "allgather")
    assert [len(block.launches) for block in blocks_of(mine, 0)] == [2, 1]
    assert [len(block.launches) for block in blocks_of(mine, 1)] == [1, 1]


def test_results_merge_in_place() -> None:
    """First results are written where they stay; rows without one are 0, with an LSE of -inf."""
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 8, 2, 4, dtype=torch.float64)
    sums = Sums(q, 3)
    truth: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(8)]
    for start, stop in ((2, 5), (1, 7), (4, 5)):
        out = torch.randn(1, stop - start, 2, 3, generator=generator, dtype=torch.float64)
        lse = torch.randn(1, 2, stop - start, generator=generator, dtype=torch.float64)
        lse[..., 0] = float("-inf")
        out[:, 0] = 0.0
        sums.add(slice(start, stop), out, lse)
        for row in range(start, stop):
            truth[row].append((out[0, row - start], lse[0, :, row - start]))
    sums.fill(slice(0, 8))
    for row, parts in enumerate(truth):
        lses = [torch.full((2,), float("-inf"), dtype=torch.float64), *(lse for _, lse in parts)]
        lse = torch.stack(lses).logsumexp(0)
        out = sum((part * (own - lse).exp().nan_to_num(0)[:, None] for part, own in parts),
                  torch.zeros(2, 3, dtype=torch.float64))  # fmt: skip
        assert torch.allclose(sums.lse[0, :, row], lse)
        assert torch.allclose(sums.out[0, row], out)

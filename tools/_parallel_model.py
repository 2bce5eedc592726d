"""Predicts the time of context-parallel attention from schedules, bandwidths and kernel rates.

The pairs that a rank computes and the rows that travel come from the very schedules of the library;
what is assumed is said here: a transfer costs its bytes over the bandwidth of the link that it
takes, plus a latency; a launch costs its pairs over the rate of the kernels, plus an overhead; a
block is computed while the next one travels. Nothing else costs anything.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import jitattn
from jitattn.distributed.blocks import Facts, blocks_of
from jitattn.distributed.heads import head_ranges
from jitattn.distributed.pieces import Span
from jitattn.distributed.rules import bounds_of
from jitattn.distributed.segments import contiguous, count_of, cuts, together, zigzag

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jitattn.distributed.pieces import Piece
    from jitattn.distributed.segments import Segments

#: Bytes of an element: 16 bits, and those of gradients of keys, which travel in fp32.
_ELEMENT, _GRADIENT = 2, 4
#: Reads and writes of fp32 results for each merge of a row.
_MERGE_PASSES: Final = 3


@dataclass(frozen=True)
class Machine:
    """What a prediction depends on."""

    forward_tflops: float = 600.0  #: of attended pairs, 4 * D flops each
    backward_tflops: float = 500.0  #: 10 * D flops each
    link_gbytes: float = 380.0  #: between GPUs of a node, one way
    net_gbytes: float = 45.0  #: between nodes, for each GPU
    memory_gbytes: float = 4000.0
    gpus_per_node: int = 8
    latency_us: float = 20.0  #: of a batch of messages
    launch_us: float = 15.0


@dataclass(frozen=True)
class Work:
    """A call: causal, or with a window and first keys."""

    length: int
    heads_q: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    window: int | None = None
    keep_first: int = 0

    @property
    def mask(self) -> jitattn.Causal | jitattn.Window:
        """Its mask."""
        if self.window is None:
            return jitattn.Causal()
        return jitattn.Window(self.window - 1, 0, self.keep_first)

    @property
    def pairs(self) -> int:
        """Attended pairs of a head."""
        whole = (contiguous([self.length])[0],)
        facts = _facts(self, whole, whole, "ring")
        return sum(pairs_of(piece) for piece in _pieces(facts, 0))


@dataclass(frozen=True)
class Prediction:
    """Seconds of a call on the slowest rank, and of one GPU alone."""

    compute: float
    transfer: float
    both: float
    alone: float
    ranks: int

    @property
    def efficiency(self) -> float:
        """Speed-up over one GPU, for each GPU."""
        return self.alone / self.both / self.ranks

    @property
    def hidden(self) -> float:
        """Share of the transfers that costs no time."""
        if not self.transfer:
            return 1.0
        return max(0.0, min(1.0, 1.0 - (self.both - self.compute) / self.transfer))


def pairs_of(piece: Piece) -> int:
    """Count the pairs of a piece that see each other."""
    left, right = piece.window
    if piece.keep_first and left is not None:  # of what lies before the window, the first keys
        rows = range(piece.num_rows)
        first = piece.num_keys - piece.num_rows - left
        hidden = _triangle(piece.num_rows - 1 + first, piece.num_rows)
        few = min(piece.keep_first, max(0, first + rows[-1]))
        kept = sum(max(0, min(few, first + i)) for i in rows)
        return pairs_of(piece._replace(left=None, keep_first=0)) - hidden + kept
    corner, last = piece.num_keys - piece.num_rows, piece.num_keys - 1
    total = piece.num_rows * (last + 1)
    if right is not None:  # keys beyond i + corner + right
        total -= _triangle(last - (corner + right), piece.num_rows)
    if left is not None:  # keys before i + corner - left
        total -= _triangle(piece.num_rows - 1 + corner - left, piece.num_rows)
    return total


def _triangle(most: int, rows: int) -> int:
    """Return most + (most - 1) + …, `rows` terms, those above 0 only."""
    count = max(0, min(most, rows))
    return count * most - count * (count - 1) // 2


def _facts(
    work: Work, rows: tuple[Segments, ...], keys: tuple[Segments, ...], method: str
) -> Facts:
    spans = (Span(0, work.length, 0, work.length),)
    return Facts(rows, keys, bounds_of(work.mask), spans, False, False, True, method)


def _pieces(facts: Facts, rank: int) -> Iterable[Piece]:
    for block in blocks_of(facts, rank):
        for launch in block.launches:
            yield from launch.pieces


def layout_of(work: Work, ranks: int) -> tuple[Segments, ...]:
    """Return the shards that `plan` makes: zigzag, but of windows contiguous."""
    if work.window is None:
        return zigzag(work.length, ranks)
    ends = cuts(work.length, ranks)
    return contiguous([b - a for a, b in itertools.pairwise(ends)])


@functools.lru_cache(256)
def alone(work: Work, machine: Machine, backward: bool) -> float:
    """Return the seconds of one GPU, forward or forward and backward."""
    return _compute(work.pairs, 1, work, machine, backward)


def _compute(pairs: int, launches: int, work: Work, machine: Machine, backward: bool) -> float:
    flops = pairs * work.heads_q * work.head_dim
    seconds = 4 * flops / machine.forward_tflops * 1e-12
    if backward:
        seconds += 10 * flops / machine.backward_tflops * 1e-12
    return seconds + launches * machine.launch_us * 1e-6 * (4 if backward else 1)


def predict(
    work: Work, ranks: int, method: str, machine: Machine, *, backward: bool, ulysses: int = 1
) -> Prediction:
    """Predict a call.

    Parameters
    ----------
    method : "ring", "allgather", "ulysses" or "hybrid"
    backward : bool
        Forward and backward, else forward alone.
    ulysses : int
        Of "hybrid": ranks along the dimension of heads, within a node.
    """
    one = alone(work, machine, backward)
    if method == "ulysses":
        ulysses = ranks
    if method in ("ring", "allgather"):
        ulysses = 1
    exchange = _exchange(work, ranks, ulysses, machine, backward)
    heads = head_ranges(work.heads_q, work.heads_kv, ulysses)
    share = max(one.size for one in heads) / work.heads_q
    kv_share = max(one.stop_kv - one.first_kv for one in heads) / work.heads_kv
    shards = layout_of(work, ranks)
    rings = ranks // ulysses
    rows = tuple(together(shards[idx * ulysses : (idx + 1) * ulysses]) for idx in range(rings))
    slowest = (0.0, 0.0, 0.0)
    for rank in sorted({0, rings // 2, rings - 1}):
        found = _ring(work, rows, rank, method, machine, backward, share, kv_share, ulysses)
        slowest = max(slowest, found, key=lambda times: times[2])
    compute, transfer, both = slowest
    return Prediction(compute, transfer + exchange, both + exchange, one, ranks)


def _exchange(work: Work, ranks: int, ulysses: int, machine: Machine, backward: bool) -> float:
    """Return the seconds of exchanging rows for heads and back, which nothing hides."""
    if ulysses == 1:
        return 0.0
    rows = work.length / ranks
    kv_copies = max(1, ulysses // work.heads_kv)
    elements = rows * work.head_dim * (2 * work.heads_q + 2 * work.heads_kv * kv_copies)
    elements *= (ulysses - 1) / ulysses
    outside = max(0.0, 1 - machine.gpus_per_node / ulysses)  # part of the ranks on other nodes
    seconds = elements * _ELEMENT * (
        outside / machine.net_gbytes + (1 - outside) / machine.link_gbytes
    ) * 1e-9  # fmt: skip
    return (seconds + 2 * machine.latency_us * 1e-6) * (2 if backward else 1)


def _ring(
    work: Work,
    rows: tuple[Segments, ...],
    rank: int,
    method: str,
    machine: Machine,
    backward: bool,
    share: float,
    kv_share: float,
    ulysses: int,
) -> tuple[float, float, float]:
    """Return (compute, transfer, both) in seconds of one rank of a ring."""
    own = "allgather" if method == "allgather" else "ring"
    blocks = blocks_of(_facts(work, rows, rows, own), rank)
    per_node = max(1, machine.gpus_per_node // ulysses)
    row_bytes = 2 * work.heads_kv * work.head_dim * kv_share
    merged = count_of(rows[rank]) * work.heads_q * share * work.head_dim * 4
    computed, arriving, total = [], [], 0.0
    for block in blocks:
        pieces = [piece for launch in block.launches for piece in launch.pieces]
        seconds = _compute(
            int(sum(map(pairs_of, pieces)) * share), len(pieces), work, machine, backward
        )
        if pieces and len(blocks) > 1:
            seconds += _MERGE_PASSES * merged / machine.memory_gbytes * 1e-9
        computed.append(seconds)
        travel = 0.0
        for part in block.parts:
            is_near = part.rank // per_node == rank // per_node
            speed = machine.link_gbytes if is_near else machine.net_gbytes
            size = _ELEMENT + (_ELEMENT + _GRADIENT if backward else 0)
            travel += (part.rows[1] - part.rows[0]) * row_bytes * size / speed * 1e-9
        arriving.append(travel + (machine.latency_us * 1e-6 if block.parts else 0.0))
    for idx, seconds in enumerate(computed):
        following = arriving[idx + 1] if idx + 1 < len(arriving) else 0.0
        total += max(seconds, following)
    return sum(computed), sum(arriving), total

"""Schedules a call over the ranks of a ring: what comes from whom, in which order, and who sees it.

Block 0 is the rank's own keys. In a ring, block t holds keys of the rank t before this one, which
sends them itself, not by way of the ranks between: so only what is seen travels. All-gather has one
block of all other ranks' keys. A window that reaches less than half a shard has a single block: the
few keys of others, which arrive first, and the rank's own.

Pure integers, memoised; alike on every rank.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jitattn.distributed.lowering import launches_of
from jitattn.distributed.pieces import joined_pieces, pieces_of
from jitattn.distributed.segments import Segment, count_of, joined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jitattn.distributed.lowering import Launch
    from jitattn.distributed.pieces import Bounds, Span
    from jitattn.distributed.segments import Segments

#: Rows first … stop - 1 of a rank.
Range: TypeAlias = tuple[int, int]


class Part(NamedTuple):
    """Rows of a rank's keys that travel together, in one message."""

    rank: int
    rows: Range


class Block(NamedTuple):
    """Keys that are computed with together.

    Attributes
    ----------
    parts : tuple of Part
        Where they come from, in the order in which they lie, this rank's own among them if there
        is one block; of the rank's own block, none.
    sends : tuple of Part
        What this rank sends meanwhile, for the others' blocks of this number.
    launches : tuple of Launch
        What is computed.
    """

    parts: tuple[Part, ...]
    sends: tuple[Part, ...]
    launches: tuple[Launch, ...]


class Facts(NamedTuple):
    """What a schedule follows from, beside the rank."""

    rows: tuple[Segments, ...]  #: of every rank
    keys: tuple[Segments, ...]
    bounds: Bounds
    spans: tuple[Span, ...]
    is_flat: bool
    by_distance: bool  #: biases depend on distances
    by_order: bool  #: no function and no bias takes part
    method: str  #: "ring" or "allgather"


@functools.lru_cache(128)
def blocks_of(facts: Facts, rank: int) -> tuple[Block, ...]:
    """Return the blocks of a rank."""
    size = len(facts.rows)
    if _is_near(facts):
        others = [(rank + turn) % size for turn in range(1, size)]
        return (_block(facts, rank, [rank, *others], others),)
    own = _launches(facts, rank, facts.keys[rank])
    blocks = [Block((), (), own)]
    if facts.method == "allgather":
        others = [(rank + turn) % size for turn in range(1, size)]
        blocks.append(_block(facts, rank, others, others))
    else:
        turns = range(1, size)
        blocks += [_block(facts, rank, [(rank - t) % size], [(rank + t) % size]) for t in turns]
    return tuple(blocks)


def _block(facts: Facts, rank: int, sources: Sequence[int], readers: Sequence[int]) -> Block:
    arriving = [
        (_segment_at(facts.keys[source], rows[0]), Part(source, rows))
        for source in sources
        for rows in (seen_ranges(facts, rank, source) if source != rank else _all(facts, rank))
    ]
    arriving.sort(key=lambda one: (one[0], one[1]))
    parts = tuple(part for _, part in arriving)
    keys = [one for part in parts for one in _segments_in(facts.keys[part.rank], part.rows)]
    sends = [Part(one, rows) for one in readers for rows in seen_ranges(facts, one, rank)]
    sends.sort(key=lambda one: (one.rank, _segment_at(facts.keys[rank], one.rows[0]), one.rows))
    return Block(parts, tuple(sends), _launches(facts, rank, joined(keys)))


def _all(facts: Facts, rank: int) -> tuple[Range, ...]:
    size = count_of(facts.keys[rank])
    return ((0, size),) if size else ()


def _is_near(facts: Facts) -> bool:
    """Return whether a window reaches so little that ranks need few keys of others."""
    left, right, keep_first = facts.bounds[:3]
    is_plain = facts.by_order and facts.rows == facts.keys and facts.bounds.shift is None
    if not is_plain or left is None or right is None or facts.bounds.full_on_decode:
        return False
    least = min(map(count_of, facts.keys))
    are_runs = all(len(one) == 1 and one[0].step == 1 for one in facts.keys)
    return are_runs and 2 * (left + right + keep_first) <= least


def _launches(facts: Facts, rank: int, keys: Segments) -> tuple[Launch, ...]:
    pieces = pieces_of(facts.rows[rank], keys, facts.bounds, facts.spans, splits=not facts.by_order)
    if facts.by_order:
        pieces = joined_pieces(pieces)
    return launches_of(pieces, is_flat=facts.is_flat, by_distance=facts.by_distance)


@functools.lru_cache(4096)
def seen_ranges(facts: Facts, reader: int, source: int) -> tuple[Range, ...]:
    """Return the rows of a rank's keys that another rank's queries see, ascending and apart.

    No range crosses from one segment into the next.
    """
    found: list[Range] = []
    first = 0
    for segment in facts.keys[source]:
        pieces = pieces_of(facts.rows[reader], (segment,), facts.bounds, facts.spans)
        for start, stop in sorted((one.key, one.key + one.num_keys) for one in pieces):
            if found and found[-1][1] >= first + start and found[-1][1] > first:
                found[-1] = found[-1][0], max(found[-1][1], first + stop)
            else:
                found.append((first + start, first + stop))
        first += segment.size
    return tuple(found)


def _segments_in(segments: Segments, rows: Range) -> Segments:
    """Return the positions of a range of rows, which lies in one segment."""
    first = 0
    for one in segments:
        if first <= rows[0] < first + one.size:
            return (one.part(rows[0] - first, rows[1] - rows[0]),)
        first += one.size
    return ()


def _segment_at(segments: Segments, row: int) -> Segment:
    """Return the position of a row, for sorting."""
    return _segments_in(segments, (row, row + 1))[0]


def travelled(facts: Facts, rank: int) -> tuple[int, int]:
    """Return how many rows of keys a rank receives, and how many all other ranks have."""
    parts = [part for block in blocks_of(facts, rank) for part in block.parts if part.rank != rank]
    received = sum(part.rows[1] - part.rows[0] for part in parts)
    return received, sum(count_of(keys) for idx, keys in enumerate(facts.keys) if idx != rank)

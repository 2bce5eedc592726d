"""Segments: arithmetic progressions of positions that a rank holds, and how ranks share a sequence.

A rank's rows lie in memory as its segments do, one after another. Contiguous shards are one segment
of step 1; zigzag shards two; striped shards (Brandon et al., arXiv:2311.09431) one whose step is
the number of ranks. Pure integers: no torch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jitattn.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Segment(NamedTuple):
    """Positions start, start + step, …; `size` of them."""

    start: int
    size: int
    step: int = 1

    @property
    def stop(self) -> int:
        """The position after the last one, in steps."""
        return self.start + self.size * self.step

    def part(self, first: int, size: int) -> Segment:
        """Return `size` positions from the one numbered `first` on."""
        return Segment(self.start + first * self.step, size, self.step)


#: The segments of a rank, in the order of its rows.
Segments: TypeAlias = tuple[Segment, ...]


def count_of(segments: Iterable[Segment]) -> int:
    """Return the number of rows in segments."""
    return sum(one.size for one in segments)


def joined(segments: Iterable[Segment]) -> Segments:
    """Join neighbours that follow each other in memory and in the sequence; drop empty ones."""
    found: list[Segment] = []
    for one in segments:
        if not one.size:
            continue
        last = found[-1] if found else None
        if last is not None and last.step == one.step and last.stop == one.start:
            found[-1] = Segment(last.start, last.size + one.size, one.step)
        else:
            found.append(one)
    return tuple(found)


def cuts(length: int, parts: int) -> tuple[int, ...]:
    """Return the ends of `parts` pieces of a sequence, whose lengths differ by 1 at most."""
    return tuple(length * idx // parts for idx in range(parts + 1))


def contiguous(lengths: Sequence[int]) -> tuple[Segments, ...]:
    """Return shards of these lengths, one after another."""
    found, start = [], 0
    for length in lengths:
        found.append(joined([Segment(start, length)]))
        start += length
    return tuple(found)


def of_chunks(length: int, owned: Sequence[Sequence[int]]) -> tuple[Segments, ...]:
    """Return the shards of ranks that own these chunks of a sequence, cut evenly.

    Parameters
    ----------
    owned : sequence of sequences of int
        The numbers of each rank's chunks, ascending.
    """
    ends = cuts(length, sum(map(len, owned)))
    return tuple(
        joined(Segment(ends[idx], ends[idx + 1] - ends[idx]) for idx in chunks) for chunks in owned
    )


def zigzag(length: int, ranks: int) -> tuple[Segments, ...]:
    """Return shards of two chunks each, the r-th from either end: causal work is even."""
    return of_chunks(length, [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)])


def striped(length: int, ranks: int) -> tuple[Segments, ...]:
    """Return shards of every `ranks`-th position."""
    return tuple(
        joined([Segment(rank, max(0, -(-(length - rank) // ranks)), ranks)])
        for rank in range(ranks)
    )


@functools.lru_cache(256)
def together(shards: tuple[Segments, ...]) -> Segments:
    """Return the segments in which the rows of several ranks lie together, in few segments.

    Segments of step 1 are sorted by position and joined; stripes that make up a whole sequence
    become one segment of step 1; other stripes stay as they are.
    """
    flat = [one for shard in shards for one in shard if one.size]
    if all(one.step == 1 for one in flat):
        return joined(sorted(flat))
    step = flat[0].step
    starts = sorted(one.start for one in flat)
    total = count_of(flat)
    if starts == list(range(min(step, total))) and {one.step for one in flat} == {step}:
        last = max(one.start + (one.size - 1) * one.step for one in flat)
        if last == total - 1:
            return (Segment(0, total),)
    return tuple(flat)


class Place(NamedTuple):
    """Where the rows of a segment lie in a tensor of others: ``x[first :: step][:size]``."""

    first: int
    step: int
    size: int

    @property
    def rows(self) -> slice:
        """The slice of rows."""
        return slice(self.first, self.first + (self.size - 1) * self.step + 1, self.step)


def place_in(segment: Segment, wholes: Sequence[Segment]) -> Place:
    """Return the place of a segment in the rows of others, one of which holds it."""
    base = 0
    for whole in wholes:
        ahead = segment.start - whole.start
        last = segment.start + (segment.size - 1) * segment.step
        is_in = ahead >= 0 and last < whole.stop and ahead % whole.step == 0
        if is_in and segment.step % whole.step == 0:
            return Place(base + ahead // whole.step, segment.step // whole.step, segment.size)
        base += whole.size
    raise InternalError(f"no segment of {wholes} holds {segment}")

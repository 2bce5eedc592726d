"""Cuts the pairs of a block of rows and a block of keys to what a positional rule lets be seen.

A rule bounds the distance of a key from a query's position: key - position from -left to right, and
the first `keep_first` keys are beyond the left bound's reach. Of segments of equal step, the pairs
that are seen are again a window, in rows and keys counted from the segments' first ones. What is
left after rows and keys that take no part are cut off is a `Piece`: a window aligned to the bottom
right of its own rows and keys, as `attention` has it, with bounds of at least 0. So a piece needs
no offset, and no key is read (or sent) that none of its rows sees. Pure integers: no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jitattn.distributed.segments import Segment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Bounds(NamedTuple):
    """Bounds of the distance key - position of what a rule lets be seen; None: no bound."""

    left: int | None
    right: int | None
    keep_first: int = 0
    shift: int | None = None  #: position of query 0 among the keys; None: Lkv - Lq
    full_on_decode: bool = False  #: sequences with one query have no left bound
    bias_shift: int | None = None  #: as `shift`, for biases that depend on the distance


class Span(NamedTuple):
    """A sequence: where its rows and its keys lie among all positions."""

    q_start: int
    q_length: int
    kv_start: int
    kv_length: int


class Piece(NamedTuple):
    """Rows and keys that see each other within a window.

    Row i sees the keys from i + c - left to i + c + right, where c is num_keys - num_rows, and of
    the first `keep_first` ones those up to i + c + right.
    """

    row: int  #: the first row, in the rows of the block of queries
    num_rows: int
    key: int  #: the first key, in the rows of the block of keys
    num_keys: int
    left: int | None
    right: int | None
    pair: tuple[int, int]  #: the numbers of its segments of rows and of keys
    sequence: int  #: the number of its sequence
    q_idx: int  #: the first row's number in its sequence
    kv_idx: int  #: the first key's
    step: int  #: of rows and keys in the sequence
    corner: int  #: distance key - position, for biases, of the last key and the last row
    keep_first: int = 0

    @property
    def window(self) -> tuple[int | None, int | None]:
        """The bounds, without those that hide nothing."""
        left = self.left
        right = self.right
        left = None if left is not None and left >= self.num_keys - 1 else left
        return left, None if right is not None and right >= self.num_rows - 1 else right


def pieces_of(
    rows: Sequence[Segment],
    keys: Sequence[Segment],
    bounds: Bounds,
    sequences: Sequence[Span],
    *,
    splits: bool = True,
) -> list[Piece]:
    """Return the pieces of a block of rows and a block of keys, in a fixed order.

    `splits` cuts off the first keys of a window, and with them all between that nobody sees; a
    piece with `keep_first` has all of them.
    """
    found: list[Piece] = []
    first_row = 0
    for q_number, q in enumerate(rows):
        here = [(idx, one) for idx, one in enumerate(sequences) if _is_in(q, one)]
        first_key = 0
        for k_number, k in enumerate(keys):
            at = _At(first_row, first_key, (q_number, k_number))
            for idx, one in here:
                found += _of_sequence(q, k, at, bounds, idx, one, splits)
            first_key += k.size
        first_row += q.size
    return found


class _At(NamedTuple):
    """Where two segments begin in their blocks, and their numbers."""

    row: int
    key: int
    pair: tuple[int, int]


def _of_sequence(
    q: Segment, k: Segment, at: _At, bounds: Bounds, idx: int, one: Span, splits: bool
) -> Iterator[Piece]:
    """Yield the pieces of a sequence in two segments."""
    skipped, q = _inside(q, one.q_start, one.q_length)
    row = at.row + skipped
    skipped, k = _inside(k, one.kv_start, one.kv_length)
    key = at.key + skipped
    if not q.size or not k.size:
        return
    corner = one.kv_length - one.q_length
    shift = corner if bounds.shift is None else bounds.shift
    bias_shift = corner if bounds.bias_shift is None else bounds.bias_shift
    step = q.step if q.size > 1 else k.step
    ahead = q.start + shift - k.start  # of the first row's position to the first key
    right = None if bounds.right is None else (ahead + bounds.right) // step
    left = None
    if bounds.left is not None and not (bounds.full_on_decode and one.q_length == 1):
        left = (bounds.left - ahead) // step
    kept = 0 if left is None else -(-(bounds.keep_first - k.start) // step)
    kept = min(max(kept, 0), k.size)
    parts: list[tuple[int, int, int | None]] = [(0, kept, None), (kept, k.size, left)]
    if not splits and left is not None and 0 < kept < k.size:
        both = _cut(q.size, 0, k.size, None, right)
        if both is not None and both[1][1] - both[0][1] + left >= 0:
            parts = [(0, k.size, left)]
    for low, high, reach in parts:
        keeps = kept if len(parts) == 1 else 0
        cut = _cut(q.size, low, high, None if keeps else reach, right)
        if cut is None:
            continue
        (i0, i1), (j0, j1) = cut
        num_rows, num_keys = i1 - i0, j1 - j0
        q_idx, kv_idx = q.start + i0 * step, k.start + j0 * step
        yield Piece(
            row + i0,
            num_rows,
            key + j0,
            num_keys,
            None if reach is None else j1 - i1 + reach,
            None if right is None else right + i1 - j1,
            at.pair,
            idx,
            q_idx,
            kv_idx,
            step,
            kv_idx - q_idx - bias_shift + step * (num_keys - num_rows),
            keeps,
        )


def _is_in(q: Segment, one: Span) -> bool:
    """Return whether rows between a segment's ends are of a sequence."""
    return one.q_start < q.stop and q.start < one.q_start + one.q_length


def joined_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """Join pieces that one launch can compute, where nothing but the order of positions matters.

    Keys that all rows see, and those that lie behind them: the window of the latter is that of
    both, with the others as its first keys. Rows that see the same keys, all of them.
    """
    found: list[Piece] = []
    for one in pieces:
        last = found[-1] if found else None
        if last is not None and last.window == (None, None):
            same_rows = (last.row, last.num_rows) == (one.row, one.num_rows)
            if same_rows and last.key + last.num_keys == one.key and not one.keep_first:
                keep_first = 0 if one.left is None else last.num_keys
                found[-1] = one._replace(
                    key=last.key, num_keys=last.num_keys + one.num_keys, keep_first=keep_first
                )
                continue
            same_keys = (last.key, last.num_keys) == (one.key, one.num_keys)
            is_next = last.row + last.num_rows == one.row
            if same_keys and is_next and one.window == (None, None):
                found[-1] = last._replace(
                    num_rows=last.num_rows + one.num_rows, left=None, right=None
                )
                continue
        found.append(one)
    return found


def _inside(segment: Segment, start: int, length: int) -> tuple[int, Segment]:
    """Return how many positions lie before a sequence, and those inside, counted from its start."""
    step = segment.step
    first = min(segment.size, max(0, -(-(start - segment.start) // step)))
    stop = min(segment.size, max(first, -(-(start + length - segment.start) // step)))
    return first, Segment(segment.start + first * step - start, stop - first, step)


def _cut(
    num_rows: int, low: int, high: int, left: int | None, right: int | None
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Cut rows and the keys low … high - 1 to those that take part in i - left <= j <= i + right.

    Returns the ends of rows and keys; None if nothing is seen.
    """
    if left is not None and right is not None and left + right < 0:
        return None  # between two keys of a stripe
    i0, i1, j0, j1 = 0, num_rows, low, high
    if right is not None:
        j1 = min(j1, i1 + right)
        i0 = max(i0, j0 - right)
    if left is not None:
        i1 = min(i1, j1 + left)
        j0 = max(j0, i0 - left)
    if right is not None:
        j1 = min(j1, i1 + right)
    return ((i0, i1), (j0, j1)) if i0 < i1 and j0 < j1 else None

"""Deals out the chunks of a sequence so that ranks have about the same number of visible pairs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import torch

from jitattn.distributed.options import split_mask
from jitattn.distributed.pieces import Bounds, Span, pieces_of
from jitattn.distributed.rules import bounds_of
from jitattn.distributed.segments import Segment, cuts, of_chunks, zigzag
from jitattn.values.masks import BlockSparse, LocalStride, MaskMod, PerHead
from jitattn.values.pairs import visible_pairs
from jitattn.values.rule_functions import Heads, pattern_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jitattn.distributed.segments import Segments
    from jitattn.values.masks import Mask, Rule

#: Contiguous shards serve if the largest costs at most this much more than the mean; of windows,
#: whose other layouts send more and need several launches, more.
_EVEN: Final = 1.05
_EVEN_OF_WINDOWS: Final = 1.25
#: Rows of a chunk, and keys, of which the pairs of a function are looked at.
_ROWS, _KEYS = 4, 1024


def dealt(
    mask: Mask, length: int, ranks: int, whole: tuple[Segments, ...], spans: Sequence[Span]
) -> tuple[str, tuple[Segments, ...]]:
    """Return the layout, and the segments of every rank.

    Parameters
    ----------
    whole : tuple
        Contiguous shards.
    spans : sequence of Span
        Packed sequences, or none.
    """
    if ranks == 1:
        return "contiguous", whole
    costs = _costs(mask, length, 2 * ranks, spans)
    of_whole = [costs[2 * rank] + costs[2 * rank + 1] for rank in range(ranks)]
    is_window = bounds_of(split_mask(mask)[0]).left is not None
    if _excess(of_whole) <= (_EVEN_OF_WINDOWS if is_window else _EVEN):
        return "contiguous", whole
    of_zigzag = [costs[rank] + costs[2 * ranks - 1 - rank] for rank in range(ranks)]
    if _excess(of_zigzag) <= _EVEN:
        return "zigzag", zigzag(length, ranks)
    pairs = _paired(costs)
    if _excess([costs[a] + costs[b] for a, b in pairs]) < _excess(of_zigzag):
        return "balanced", of_chunks(length, _in_order(pairs))
    return "zigzag", zigzag(length, ranks)


def _excess(costs: Sequence[float]) -> float:
    mean = sum(costs) / len(costs)
    return max(costs) / mean if mean else 1.0


def _paired(costs: Sequence[float]) -> list[tuple[int, int]]:
    """Pair the dearest chunk with the cheapest, and so on: the best of all pairings."""
    order = sorted(range(len(costs)), key=lambda idx: (costs[idx], idx))
    half = len(order) // 2
    return [(order[idx], order[-1 - idx]) for idx in range(half)]


def _in_order(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Give ranks in the order of their first chunks what lies near them."""
    return sorted((min(pair), max(pair)) for pair in pairs)


def _costs(mask: Mask, length: int, chunks: int, spans: Sequence[Span]) -> list[float]:
    """Return the number of pairs that the rows of every chunk see, in one head."""
    rule, _, function = split_mask(mask)
    ends = cuts(length, chunks)
    rows = [Segment(a, b - a) for a, b in itertools.pairwise(ends)]
    all_spans = tuple(spans) or (Span(0, length, 0, length),)
    bounds = bounds_of(rule)
    seen = [_pairs_seen(one, length, bounds, all_spans) for one in rows]
    if function is None and not isinstance(rule, LocalStride | BlockSparse | PerHead):
        return seen
    parts = [_part_seen(one, length, rule, function) for one in rows]
    return [count * part for count, part in zip(seen, parts, strict=True)]


def _pairs_seen(row: Segment, length: int, bounds: Bounds, spans: tuple[Span, ...]) -> float:
    total = 0
    for one in pieces_of((row,), (Segment(0, length),), bounds, spans):
        # The sum over rows of min(i + c + right, keys - 1) - max(i + c - left, 0) + 1.
        corner = one.num_keys - one.num_rows
        upper = _clamped_sum(one.num_rows, corner + (one.right or 0), one.num_keys - 1)
        if one.right is None:
            upper = one.num_rows * (one.num_keys - 1)
        lower = 0
        if one.left is not None:
            lower = -_clamped_sum(one.num_rows, -(corner - one.left + one.num_rows - 1), 0)
        total += upper - lower + one.num_rows
    return float(total)


def _clamped_sum(count: int, first: int, most: int) -> int:
    """Return the sum of min(first + i, most) over i below count."""
    below = min(count, max(0, most - first + 1))
    return below * first + below * (below - 1) // 2 + (count - below) * most


def _part_seen(row: Segment, length: int, rule: Rule, function: MaskMod | None) -> float:
    """Return which part of sampled pairs within the bounds a pattern or a function sees."""
    if not row.size:
        return 1.0
    step = max(1, row.size // _ROWS)
    rows = torch.arange(row.start + step // 2, row.stop, step, device="cpu")
    count = min(length, _KEYS)
    keys = torch.arange(count, device="cpu") * (length - 1) // max(1, count - 1)
    low, high = bounds_of(rule)[:2]
    ahead = keys[None, :] - rows[:, None]
    inside = torch.ones_like(ahead, dtype=torch.bool)
    if high is not None:
        inside &= ahead <= high
    if low is not None:
        inside &= ahead >= -low
    if not inside.any():
        return 1.0
    seen = inside
    if function is not None:
        device = _device_of(function)
        at_rows, at_keys = rows.to(device), keys.to(device)
        moved = _at(function, at_rows, at_keys)
        sizes = (1, 1, len(rows), len(keys))
        seen = seen & visible_pairs(moved, sizes, device)[0, 0].cpu()
    heads = Heads(1, 1)
    if isinstance(rule, BlockSparse):
        columns = rule.blocks.any(dim=0).cpu()
        size = rule.block_size
        if columns.numel():
            r = (rows // size).clamp(max=columns.shape[0] - 1)
            c = (keys // size).clamp(max=columns.shape[1] - 1)
            seen = seen & columns[r[:, None], c[None, :]]
    elif isinstance(rule, LocalStride):
        pattern = pattern_of(rule, heads, "cpu")
        if pattern is not None:
            seen = seen & pattern(rows[:1, None] * 0, rows[:, None], keys[None, :], False)
    return float(seen.sum()) / float(inside.sum())


def _device_of(mask: MaskMod) -> torch.device | str:
    """Return the device of the tensors that a mask function reads, if there are any."""
    from jitattn.values.function_cache import function_of

    tensors = function_of(None, mask).tensors
    return tensors[0].device if tensors else "cpu"


def _at(mask: MaskMod, rows: torch.Tensor, keys: torch.Tensor) -> MaskMod:
    """Return a mask function of sampled rows and keys."""
    kind, parts = mask.parts
    if kind:
        moved = [_at(one, rows, keys) for one in parts]
        if kind == "not":
            return ~moved[0]
        return moved[0].both(moved[1]) if kind == "and" else moved[0] | moved[1]
    function = mask.function
    return MaskMod(lambda b, h, q_idx, kv_idx: function(b, h, rows[q_idx], keys[kv_idx]))

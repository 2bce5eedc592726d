"""Positional rules as functions of positions, which kernels trace as they do a `MaskMod`.

For rows and keys that stand at an offset which no rule has a number for: a shard's, or a call's
with `q_offset`. Their hidden blocks are found and skipped as those of every traced mask.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jitattn.errors import InternalError
from jitattn.values.masks import BlockSparse, Causal, Full, LocalStride, PerHead, Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from jitattn.values.masks import HeadRule, Rule

#: Rules that are more than bounds of the distance.
PATTERNS: Final = (LocalStride, BlockSparse, PerHead)


class Heads(NamedTuple):
    """Head counts of a whole call."""

    heads_q: int
    heads_kv: int


@functools.lru_cache(64)
def pattern_of(
    rule: Rule, heads: Heads, device: torch.device | str | None = None
) -> Callable[..., Any] | None:
    """Return a pattern as a function of (h, position, key, is_decode); None: bounds say it all.

    `h` counts the query heads of the whole call; `is_decode` says whether a sequence has one query.
    """
    if isinstance(rule, LocalStride):
        return _local_stride(rule, heads)
    if isinstance(rule, BlockSparse):
        return _block_sparse(rule, heads)
    if isinstance(rule, PerHead):
        return _per_head(rule, heads, device)
    return None


def _local_stride(rule: LocalStride, heads: Heads) -> Callable[..., Any]:
    size, stride = rule.block_size, rule.vert_stride
    left, right = rule.local
    group = heads.heads_q // max(1, heads.heads_kv)
    head_step, offset = rule.step(max(1, heads.heads_q)), rule.head_offset
    first_dense = heads.heads_kv - rule.num_dense_heads

    def causal(h: Any, position: Any, key: Any, is_decode: Any) -> Any:  # noqa: ANN401 - symbols
        row, column, kv_head = position // size, key // size, h // group
        on_stride = (column + kv_head * head_step + offset) % stride == 0
        seen = (row - column < left) | on_stride | (kv_head >= first_dense)
        return seen & (key <= position)

    def both_ways(h: Any, position: Any, key: Any, is_decode: Any) -> Any:  # noqa: ANN401
        row, column = position // size, key // size
        before, after = row - column - left + 1, column - row - right + 1
        distance = before.clamp(min=0) + after.clamp(min=0)
        return (distance % stride == 0) & (position >= 0)

    return causal if rule.causal else both_ways


def _block_sparse(rule: BlockSparse, heads: Heads) -> Callable[..., Any]:
    blocks, size, is_causal = rule.blocks, rule.block_size, rule.causal
    count, rows, columns = blocks.shape
    if not rows * columns:
        return lambda h, position, key, is_decode: key < 0
    group = heads.heads_q // count if count > 1 else max(1, heads.heads_q)

    def seen(h: Any, position: Any, key: Any, is_decode: Any) -> Any:  # noqa: ANN401 - symbols
        row, column = position // size, key // size
        inside = (position >= 0) & (row < rows) & (column < columns)
        found = blocks[h // group, row.clamp(0, rows - 1), column.clamp(0, columns - 1)] & inside
        return found & (key <= position) if is_causal else found

    return seen


def _per_head(rule: PerHead, heads: Heads, device: torch.device | str | None) -> Callable[..., Any]:
    """Return the union over different rules, each for the heads that have it."""
    group = heads.heads_q // max(1, len(rule.rules))
    distinct: list[HeadRule] = []
    numbers: list[int] = []
    for one in rule.rules:
        known = [idx for idx, other in enumerate(distinct) if other is one or other == one]
        numbers.append(known[0] if known else len(distinct))
        if not known:
            distinct.append(one)
    kinds = torch.tensor(numbers, dtype=torch.int32, device=device)
    functions = tuple(function_of_rule(one, heads, device) for one in distinct)

    def seen(h: Any, position: Any, key: Any, is_decode: Any) -> Any:  # noqa: ANN401 - symbols
        kind = kinds[h // group]
        found = None
        for idx, function in enumerate(functions):
            own = function(h, position, key, is_decode) & (kind == idx)
            found = own if found is None else found | own
        return found

    return seen


def function_of_rule(
    rule: Rule, heads: Heads, device: torch.device | str | None = None
) -> Callable[..., Any]:
    """Return a rule as a function, as `pattern_of`."""
    pattern = pattern_of(rule, heads, device)
    return _within(rule) if pattern is None else pattern


def _within(rule: Rule) -> Callable[..., Any]:
    """Return a rule that bounds the distance, as a function."""
    if isinstance(rule, Full):
        return lambda h, position, key, is_decode: key >= 0
    if not isinstance(rule, Causal | Window):
        raise InternalError(f"{rule} bounds no distance")
    left: int | None = None
    right: int | None = 0
    keep_first, full_on_decode = 0, False
    if isinstance(rule, Window):
        left, right = rule.left, rule.right
        keep_first, full_on_decode = rule.keep_first, rule.full_on_decode

    def seen(h: Any, position: Any, key: Any, is_decode: Any) -> Any:  # noqa: ANN401 - symbols
        found = key >= 0
        if left is not None:
            found = (key >= position - left) | (key < keep_first)
            if full_on_decode:
                found = found | is_decode
        if right is not None:
            found = found & (key <= position + right)
        return found

    return seen

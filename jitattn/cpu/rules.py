"""Masks and score modifiers of the CPU path, chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import InternalError
from jitattn.values.dropout import keeps
from jitattn.values.masks import BlockSparse, Causal, LocalStride, PerHead, Window, parts_of
from jitattn.values.strided_blocks import sees_block

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.scores import Scores
    from jitattn.values.masks import Mask

#: The fields of `Scores` that `Rules.change` reads.
_CHANGES: Final = ("bias", "relative_bias", "alibi_slopes", "softcap")


class Rules(NamedTuple):
    """Mask and score modifiers of a call over sequences of equal lengths.

    A query sees the keys below `query + right`, of those the ones from `query + left` on, and the
    first `keep_first`. (None: no bound.)
    """

    right: int | None
    left: int | None
    keep_first: int
    offset: int  #: position of query 0 among the keys
    key_padding: Tensor | None  #: [B, Lkv]
    dense: Tensor | None  #: [B or 1, Hq or 1, Lq or 1, Lkv]
    pattern: LocalStride | BlockSparse | None
    heads: tuple[int, int]  #: of q, and of k and v
    scores: Scores
    per_head: tuple[Rules, ...] = ()  #: one per query head, instead of a common rule

    @classmethod
    def of(
        cls, mask: Mask, scores: Scores, len_q: int, len_kv: int, heads: tuple[int, int]
    ) -> Rules:
        """Build the rules of a mask for these lengths."""
        parts, offset = parts_of(mask), len_kv - len_q
        right = left = None
        keep_first = 0
        rule = parts.rule
        if isinstance(rule, Causal):
            right = 1 + (offset if rule.align == "bottom_right" else 0)
        elif isinstance(rule, LocalStride):
            right = offset + 1 if rule.causal else None
        elif isinstance(rule, BlockSparse):
            if rule.first_row is not None:
                offset = rule.first_row
            right = offset + 1 if rule.causal else None
        elif isinstance(rule, Window):
            right = None if rule.right is None else offset + rule.right + 1
            if rule.left is not None and not (rule.full_on_decode and len_q == 1):
                left, keep_first = offset - rule.left, rule.keep_first
        return cls(
            right,
            left,
            keep_first,
            offset,
            None if parts.key_padding is None else parts.key_padding.keep,
            None if parts.dense is None else parts.dense.keep,
            rule if isinstance(rule, LocalStride | BlockSparse) else None,
            heads,
            scores,
            cls._of_heads(rule, scores, len_q, len_kv, heads) if isinstance(rule, PerHead) else (),
        )

    @classmethod
    def _of_heads(
        cls, rule: PerHead, scores: Scores, len_q: int, len_kv: int, heads: tuple[int, int]
    ) -> tuple[Rules, ...]:
        made = {part: cls.of(part, scores, len_q, len_kv, heads) for part in rule.rules}
        repeats = heads[0] // max(1, len(rule.rules))
        return tuple(made[part] for part in rule.rules for _ in range(repeats))

    def key_ranges(self, first_q: int, rows: int, len_kv: int) -> list[tuple[int, int]]:
        """Return the key ranges visible to any of the queries first_q … first_q + rows - 1."""
        if self.per_head:
            ranges = [r for one in self.per_head for r in one.key_ranges(first_q, rows, len_kv)]
            ranges = [(start, stop) for start, stop in ranges if start < stop]
            return [(min(ranges)[0], max(stop for _, stop in ranges))] if ranges else []
        stop = len_kv
        if self.right is not None:
            stop = max(0, min(len_kv, first_q + rows - 1 + self.right))
        if self.left is None:
            return [(0, stop)]
        start = max(0, min(first_q + self.left, stop))
        kept = min(self.keep_first, start)
        return [(0, kept), (start, stop)]

    def hidden(
        self, first_q: int, rows: int, first_k: int, last_k: int, device: torch.device
    ) -> Tensor | None:
        """Return the mask of hidden scores of a chunk, broadcastable to [B, Hq, rows, keys]."""
        query_idx = torch.arange(first_q, first_q + rows, device=device)[:, None]
        key_idx = torch.arange(first_k, last_k, device=device)[None, :]
        found: list[Tensor] = []
        if self.per_head:
            found.append(self._hidden_by_head(first_q, rows, first_k, last_k, device))
        if self.right is not None and last_k > first_q + self.right:
            found.append(key_idx >= query_idx + self.right)
        if self.left is not None and first_k < first_q + rows - 1 + self.left:
            found.append((key_idx < query_idx + self.left) & (key_idx >= self.keep_first))
        if self.pattern is not None:
            found.append(~_blocks(self.pattern, self.heads, query_idx + self.offset, key_idx))
        if self.key_padding is not None:
            found.append(~self.key_padding[:, None, None, first_k:last_k])
        if self.dense is not None:
            found.append(~_rows(self.dense, first_q, rows)[..., first_k:last_k])
        hidden = None
        for part in found:
            hidden = part if hidden is None else hidden | part
        return hidden

    def _hidden_by_head(
        self, first_q: int, rows: int, first_k: int, last_k: int, device: torch.device
    ) -> Tensor:
        nothing = torch.zeros(1, rows, last_k - first_k, dtype=torch.bool, device=device)
        made: dict[int, Tensor] = {}
        parts = []
        for head, one in enumerate(self.per_head):
            if id(one) not in made:
                hidden = one.hidden(first_q, rows, first_k, last_k, device)
                made[id(one)] = nothing if hidden is None else _three(hidden)
            part = made[id(one)]
            parts.append(part[head] if len(part) > 1 else part[0])
        return torch.stack(parts) if parts else nothing

    @property
    def changes_scores(self) -> bool:
        """Whether `change` modifies scores."""
        return any(getattr(self.scores, name) is not None for name in _CHANGES)

    def drop(self, weights: Tensor, first_q: int, first_k: int) -> Tensor:
        """Apply dropout to the weights [B, Hq, rows, keys] of a chunk."""
        dropout = self.scores.dropout
        if dropout is None:
            raise InternalError("no dropout takes part")
        batch, heads, rows, keys = weights.shape
        queries, keys_here = range(first_q, first_q + rows), range(first_k, first_k + keys)
        return weights * keeps(dropout, batch, heads, queries, keys_here) * dropout.scale

    def change(self, scores: Tensor, first_q: int, first_k: int) -> Tensor:
        """Apply soft cap and biases to the scaled scores [B, Hq, rows, keys] of a chunk."""
        rows, keys = scores.shape[2:]
        softcap, bias = self.scores.softcap, self.scores.bias
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if self.scores.alibi_slopes is not None or self.scores.relative_bias is not None:
            query_idx = torch.arange(first_q, first_q + rows, device=scores.device)[:, None]
            key_idx = torch.arange(first_k, first_k + keys, device=scores.device)[None, :]
            distance = key_idx - query_idx - self.offset
            if self.scores.alibi_slopes is not None:
                slopes = self.scores.alibi_slopes.to(scores.dtype)
                slopes = slopes[None] if slopes.dim() == 1 else slopes
                scores = scores - slopes[:, :, None, None] * distance.abs()
            if self.scores.relative_bias is not None:
                table = self.scores.relative_bias.to(scores.dtype)
                reach = table.shape[1] // 2
                scores = scores + table[:, distance.clamp(-reach, reach) + reach]
        if bias is not None:
            part = _rows(bias, first_q, rows)[..., first_k : first_k + keys]
            scores = scores + part.to(scores.dtype)
        return scores


def _blocks(
    rule: LocalStride | BlockSparse, heads: tuple[int, int], position: Tensor, key_idx: Tensor
) -> Tensor:
    """Return the visible keys of a pattern, [Hq or 1, rows, keys]."""
    if isinstance(rule, BlockSparse):
        return _listed(rule, heads, position, key_idx)
    row = torch.div(position, rule.block_size, rounding_mode="floor")
    column = key_idx // rule.block_size
    if not rule.causal:
        return (sees_block(rule, row, column) & (position >= 0))[None]
    heads_q, heads_kv = heads
    kv_head = torch.arange(heads_q, device=key_idx.device)[:, None, None]
    kv_head = kv_head // max(1, heads_q // max(1, heads_kv))
    shift = kv_head * rule.step(max(1, heads_q)) + rule.head_offset
    return sees_block(rule, row, column, shift) | (kv_head >= heads_kv - rule.num_dense_heads)


def _three(hidden: Tensor) -> Tensor:
    """Add a head dimension to [rows, keys] if there is none."""
    return hidden if hidden.dim() == 3 else hidden[None]


def _listed(rule: BlockSparse, heads: tuple[int, int], position: Tensor, key_idx: Tensor) -> Tensor:
    """Return the visible keys of a block-sparse pattern, [Hq or 1, rows, keys]."""
    blocks = rule.blocks
    rows, columns = blocks.shape[1:]
    row = torch.div(position, rule.block_size, rounding_mode="floor")
    column = key_idx // rule.block_size
    inside = (row >= 0) & (row < rows) & (column < columns)
    if not rows * columns:
        return inside[None]
    seen = blocks[:, row.clamp(0, rows - 1), column.clamp(max=columns - 1)] & inside
    return seen if len(blocks) == 1 else seen.repeat_interleave(heads[0] // len(blocks), dim=0)


def _rows(matrix: Tensor, first_q: int, rows: int) -> Tensor:
    """Slice rows of a [B, H, Lq or 1, Lkv] tensor."""
    return matrix if matrix.shape[2] == 1 else matrix[:, :, first_q : first_q + rows]

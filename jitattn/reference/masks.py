"""Masks as explicit boolean matrices; True = attend."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from jitattn.errors import InvalidInputError
from jitattn.values.masks import (
    BlockSparse,
    Both,
    Causal,
    Dense,
    Full,
    KeyPadding,
    LocalStride,
    PerHead,
    Window,
    parts_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask, Rule


def visible(
    mask: Mask, len_q: int, len_kv: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Return the mask of a positional rule, [Lq, Lkv]; True = attend."""
    query_idx = torch.arange(len_q, device=device)[:, None]
    key_idx = torch.arange(len_kv, device=device)[None, :]
    if isinstance(mask, Full):
        return torch.ones(len_q, len_kv, dtype=torch.bool, device=device)
    if isinstance(mask, Causal):
        if mask.align == "bottom_right":
            return key_idx <= query_idx + len_kv - len_q
        return key_idx <= query_idx
    if isinstance(mask, Window):
        position = query_idx + len_kv - len_q
        attend = torch.ones(len_q, len_kv, dtype=torch.bool, device=device)
        if mask.left is not None and not (mask.full_on_decode and len_q == 1):
            attend = (key_idx >= position - mask.left) | (key_idx < mask.keep_first)
        if mask.right is not None:
            attend = attend & (key_idx <= position + mask.right)
        return attend
    raise InvalidInputError(f"mask={mask!r}: the reference knows no such rule")


def pattern(
    mask: LocalStride,
    heads_q: int,
    heads_kv: int,
    len_q: int,
    len_kv: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the mask of a local + stride pattern, [Hq, Lq, Lkv]; True = attend."""
    position = torch.arange(len_q, device=device)[:, None] + len_kv - len_q
    key_idx = torch.arange(len_kv, device=device)[None, :]
    i, j = position.div(mask.block_size, rounding_mode="floor"), key_idx // mask.block_size
    heads = []
    for head in range(heads_q):
        kv_head = head // (heads_q // heads_kv)
        if mask.causal:
            shift = kv_head * mask.step(heads_q) + mask.head_offset
            on_stride = (j + shift) % mask.vert_stride == 0
            is_dense = kv_head >= heads_kv - mask.num_dense_heads
            seen = (i - j < mask.local[0]) | on_stride
            seen = torch.ones_like(seen) if is_dense else seen
            heads.append(seen & (key_idx <= position))
        else:
            left, right = mask.local
            distance = (i - j - left + 1).clamp(min=0) + (j - i - right + 1).clamp(min=0)
            heads.append((distance % mask.vert_stride == 0) & (position >= 0))
    return torch.stack(heads) if heads else key_idx.new_ones(0, len_q, len_kv, dtype=torch.bool)


def block_pattern(
    mask: BlockSparse,
    heads_q: int,
    len_q: int,
    len_kv: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the mask of a block-sparse pattern, [Hq, Lq, Lkv]; True = attend."""
    first = len_kv - len_q if mask.first_row is None else mask.first_row
    blocks = mask.pattern.to(device)
    blocks = blocks.expand(1, *blocks.shape) if blocks.dim() == 2 else blocks
    elements = blocks.repeat_interleave(mask.block_size, 1).repeat_interleave(mask.block_size, 2)
    attend = torch.zeros(len(blocks), len_q, len_kv, dtype=torch.bool, device=device)
    for query in range(len_q):
        position = first + query
        if 0 <= position < elements.shape[1]:
            row = elements[:, position, :len_kv]
            if mask.causal:
                row = row[:, : position + 1]
            attend[:, query, : row.shape[1]] = row
    return attend.repeat_interleave(heads_q // len(blocks), 0)


def _rule(
    rule: Rule,
    heads_q: int,
    heads_kv: int,
    len_q: int,
    len_kv: int,
    device: torch.device | str | None,
) -> Tensor:
    """Return the mask of a positional rule, [Hq or 1, Lq, Lkv]."""
    if isinstance(rule, LocalStride):
        return pattern(rule, heads_q, heads_kv, len_q, len_kv, device=device)
    if isinstance(rule, BlockSparse):
        return block_pattern(rule, heads_q, len_q, len_kv, device=device)
    if isinstance(rule, PerHead):
        rows = []
        for head in range(heads_q):
            part = rule.rules[head * len(rule.rules) // heads_q]
            seen = _rule(part, heads_q, heads_kv, len_q, len_kv, device)
            rows.append(seen[head if len(seen) > 1 else 0])
        empty = (0, len_q, len_kv)
        return torch.stack(rows) if rows else torch.ones(empty, dtype=torch.bool, device=device)
    return visible(rule, len_q, len_kv, device=device)[None]


def _from(
    rule: Rule,
    offset: int,
    heads_q: int,
    heads_kv: int,
    len_q: int,
    len_kv: int,
    device: torch.device | str | None,
) -> Tensor:
    """Return a rule's mask for queries from a position on: a part of a larger, square one's."""
    rule = _without_alignment(rule, len_q)
    before, whole = max(0, -offset), max(len_kv, offset + len_q)
    larger = _rule(rule, heads_q, heads_kv, before + whole, whole, device)
    return larger[:, before + offset : before + offset + len_q, :len_kv]


def _without_alignment(rule: Rule, len_q: int) -> Rule:
    """Return a rule aligned to the bottom right, without what depends on the number of queries."""
    if isinstance(rule, Causal):
        return Causal()
    if isinstance(rule, BlockSparse):
        return replace(rule, first_row=None)
    if isinstance(rule, Window) and rule.full_on_decode:
        return replace(rule, full_on_decode=False, left=None if len_q == 1 else rule.left)
    if isinstance(rule, PerHead):
        return PerHead([_without_alignment(one, len_q) for one in rule.rules])  # type: ignore[misc]
    return rule


def attended(
    mask: Mask,
    batch: int,
    heads_q: int,
    heads_kv: int,
    len_q: int,
    len_kv: int,
    offsets: list[int] | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the whole mask, broadcastable to [B, Hq, Lq, Lkv]; True = attend.

    `offsets` are the positions of each sequence's first query, in place of the rule's alignment.
    """
    parts = parts_of(mask)
    if offsets is None or not batch:
        attend = _rule(parts.rule, heads_q, heads_kv, len_q, len_kv, device)
        attend = attend.expand(batch, *attend.shape)
    else:
        sizes = (heads_q, heads_kv, len_q, len_kv)
        attend = torch.stack([_from(parts.rule, one, *sizes, device) for one in offsets])
    if parts.key_padding is not None:
        attend = attend & parts.key_padding.keep[:, None, None, :len_kv].to(device)
    if parts.dense is not None:
        keep = parts.dense.keep.to(device)[..., :len_kv]
        attend = attend & (keep if keep.shape[2] == 1 else keep[:, :, :len_q])
    return attend


def of_sequence(mask: Mask, b: int) -> Mask:
    """Return the mask of one sequence of the batch."""
    parts = parts_of(mask)
    padding, dense = parts.key_padding, parts.dense
    if padding is not None:
        padding = KeyPadding(padding.keep[b : b + 1])
    if dense is not None and dense.keep.shape[0] > 1:
        dense = Dense(dense.keep[b : b + 1])
    return Both(parts.rule, padding, dense, parts.function)

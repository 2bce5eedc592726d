"""Builds block lists, the sparse masks of `MaskKind.BLOCK_LISTS` kernels.

For every `positions` consecutive query positions, a list names the groups of 16 keys that any of
them sees, with a bit for every cell of 8 queries and 8 keys. Heads with the same mask share a list.
Beside its list every head has a window, so that bounds need not be at blocks. Lists depend on the
rule and on head counts, and cover lengths rounded up: the first call that needs them builds them on
the device, and they are cached (block_list_cache.py).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import InternalError, LaunchError
from jitattn.jit import backend
from jitattn.request.block_list_cache import BlockListCache, identity_of
from jitattn.spec.call_arguments import BlockListArguments
from jitattn.values.masks import (
    BlockSparse,
    Causal,
    Full,
    FunctionBlocks,
    LocalStride,
    PerHead,
    Window,
)
from jitattn.values.strided_blocks import sees_block

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor

    from jitattn.values.masks import Rule

#: A window bound that hides no key.
_OPEN: Final = 2**29
_GROUP: Final = 16
#: Queries and keys of a cell.
_CELL: Final = 8
#: Tiles times groups that are processed at once: 8 bytes each.
_MOST_PLACES: Final = 2**24
_cache = BlockListCache()


class BlockLists(NamedTuple):
    """The arrays of `FwdBlockListParams`, and the positions of a tile of a list."""

    groups: Tensor  #: int32 [n, 2]
    spans: Tensor  #: int32 [lists, tiles, 2]
    heads: Tensor  #: int32 [2, Hq, 4]
    positions_log2: int

    @property
    def nbytes(self) -> int:
        """Return the size of the arrays in bytes."""
        return sum(tensor.nbytes for tensor in (self.groups, self.spans, self.heads))

    @property
    def arguments(self) -> BlockListArguments:
        """Return the kernel arguments."""
        return BlockListArguments(
            list_groups=self.groups.data_ptr(),
            list_spans=self.spans.data_ptr(),
            list_heads=self.heads.data_ptr(),
            list_tiles=self.spans.shape[1],
            list_log2=self.positions_log2,
        )


class _Head(NamedTuple):
    """The mask of one head: a block list, its sharing key, and a window."""

    key: Hashable
    right: int = _OPEN
    left: int = -_OPEN
    keep_first: int = 0
    #: Predicate (query block, key block) → visible; None: all blocks are visible, also to queries
    #: before the first key, which see nothing in a pattern.
    sees: Callable[[Tensor, Tensor], Tensor] | None = None
    block_size: int = 128


def heads_agree(rule: Rule, heads_q: int, heads_kv: int) -> bool:
    """Return whether all query heads of each kv head have the same mask."""
    group = heads_q // max(1, heads_kv)
    if isinstance(rule, PerHead):
        if len(rule.rules) == heads_kv:
            return all(heads_agree(part, heads_q, heads_kv) for part in rule.rules)
        alike = all(
            len({identity_of(rule.rules[first + i]) for i in range(group)}) == 1
            for first in range(0, heads_q, group)
        )
        return alike and all(heads_agree(part, heads_q, heads_kv) for part in rule.rules)
    if isinstance(rule, FunctionBlocks):
        return not rule.by_head or heads_q == heads_kv
    return not (isinstance(rule, BlockSparse) and len(rule.blocks) == heads_q > heads_kv)


def block_lists_of(
    rule: Rule,
    heads: tuple[int, int],
    longest: int,
    tile_positions: int,
    device: torch.device,
) -> BlockLists:
    """Return the block lists of a rule, building them on first use.

    Parameters
    ----------
    rule : BlockSparse, LocalStride or PerHead
    heads : (int, int)
        Of q, and of k and v.
    longest : int
        Key positions to cover, those of queries among them.
    tile_positions : int
        Positions of a query tile, a power of two.
    device : torch.device
        With the current stream's device current.

    Raises
    ------
    LaunchError
        They are not there, and the current stream is capturing a graph.
    """
    covered = max(1024, 1 << (longest - 1).bit_length()) if longest > 0 else 1024
    smallest = min((part.block_size for part in _patterns(rule)), default=64)
    positions = max(_CELL, tile_positions, smallest)
    key = (identity_of(rule), heads, covered, positions, device)
    found = _cache.find(key, rule, device)
    is_capturing = device.type == "cuda" and backend.active.is_capturing()
    if found is None:
        if is_capturing:
            raise LaunchError(
                "the block lists of this mask are not made yet, and the current stream is "
                "capturing a CUDA graph; make one call with the same mask, head counts and lengths "
                "before the capture"
            )
        found = _cache.make(
            key, rule, device, lambda: _build(rule, heads, covered, positions, device)
        )
    if is_capturing:
        _cache.pin(found)
    return found


def _patterns(rule: Rule) -> list[BlockSparse | LocalStride]:
    parts = rule.rules if isinstance(rule, PerHead) else (rule,)
    return [part for part in parts if isinstance(part, BlockSparse | LocalStride)]


def _build(
    rule: Rule, heads: tuple[int, int], covered: int, positions: int, device: torch.device
) -> BlockLists:
    both = [
        [_head(rule, head, heads, device, is_alone=alone) for head in range(heads[0])]
        for alone in (False, True)
    ]
    numbers: dict[Hashable, int] = {}
    groups: list[Tensor] = []
    spans: list[Tensor] = []
    before = 0
    for head in (*both[0], *both[1]):
        if head.key in numbers:
            continue
        numbers[head.key] = len(numbers)
        own, span = _list(head, covered, positions, device)
        span[:, 0] += before
        before += len(own)
        groups.append(own)
        spans.append(span)
    table = [
        [
            [
                2 * numbers[head.key] + (head.sees is not None),
                head.right,
                head.left,
                head.keep_first,
            ]
            for head in row
        ]
        for row in both
    ]
    return BlockLists(
        torch.cat(groups) if groups else torch.zeros(0, 2, dtype=torch.int32, device=device),
        torch.stack(spans),
        torch.tensor(table, dtype=torch.int32, device=device).contiguous(),
        positions.bit_length() - 1,
    )


def _head(
    rule: Rule, head: int, heads: tuple[int, int], device: torch.device, *, is_alone: bool
) -> _Head:
    """Return the mask of a head; `is_alone`: in a sequence with a single query."""
    heads_q, heads_kv = heads
    kv_head = head // (heads_q // heads_kv)
    if isinstance(rule, PerHead):
        part = rule.rules[head if len(rule.rules) == heads_q else kv_head]
        return _head(part, head, heads, device, is_alone=is_alone)
    if isinstance(rule, Full):
        return _Head("all")
    if isinstance(rule, Causal):
        return _Head("before", 0)
    if isinstance(rule, Window):
        left, right, keep_first = rule.reach
        if rule.left is None or (rule.full_on_decode and is_alone):
            left = _OPEN
        if left >= _OPEN:
            return _Head(("to", min(right, _OPEN)), min(right, _OPEN))
        key = ("window", left, right, keep_first)
        return _Head(key, min(right, _OPEN), -left, keep_first)
    if isinstance(rule, LocalStride):
        return _of_local_stride(rule, kv_head, heads)
    if isinstance(rule, FunctionBlocks):
        raise InternalError("a kernel makes the lists of functions")
    blocks = rule.blocks.to(device)
    place = 0 if len(blocks) == 1 else head if len(blocks) == heads_q else kv_head
    own = blocks[place]

    def is_set(row: Tensor, column: Tensor) -> Tensor:
        inside = (row < own.shape[0]) & (column < own.shape[1])
        if not own.numel():
            return torch.zeros_like(inside)
        return inside & own[row.clamp(max=own.shape[0] - 1), column.clamp(max=own.shape[1] - 1)]

    right = 0 if rule.causal else _OPEN
    return _Head((identity_of(rule), place), right, sees=is_set, block_size=rule.block_size)


def _of_local_stride(rule: LocalStride, kv_head: int, heads: tuple[int, int]) -> _Head:
    if rule.causal and kv_head >= heads[1] - rule.num_dense_heads:
        return _Head("before", 0)
    shift = (kv_head * rule.step(heads[0]) + rule.head_offset) % rule.vert_stride
    key = ("stride", rule.block_size, rule.local, rule.vert_stride, shift if rule.causal else -1)
    sees = partial(sees_block, rule, shift=shift)
    return _Head(key, 0 if rule.causal else _OPEN, sees=sees, block_size=rule.block_size)


def _list(head: _Head, covered: int, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Build the groups [n, 2] and spans [tiles, 2] of one list."""
    tiles, num_groups = -(-covered // positions), -(-covered // _GROUP)
    every = (1 << min(positions, 128) // _CELL) - 1
    every |= every << 16
    if head.sees is None and (head.keep_first == 0 or head.left <= -_OPEN):
        return _runs(head, tiles, positions, num_groups, every, device)
    groups, counts = [], []
    step = max(1, _MOST_PLACES // num_groups)
    for first_tile in range(0, tiles, step):
        tile = torch.arange(first_tile, min(first_tile + step, tiles), device=device)[:, None]
        first, last = tile * positions, tile * positions + positions - 1
        key = torch.arange(num_groups, device=device)[None, :] * _GROUP
        seen = key <= last + head.right
        seen &= (key + _GROUP > first + head.left) | (key < head.keep_first)
        bits = seen * (every if head.sees is None else _pattern_bits(head, tile, positions, key))
        where = bits.nonzero()
        words = bits[where[:, 0], where[:, 1]]
        groups.append(torch.stack([where[:, 1], words], dim=1).to(torch.int32))
        counts.append(torch.bincount(where[:, 0], minlength=len(tile)))
    count = torch.cat(counts)
    return torch.cat(groups), torch.stack([count.cumsum(0) - count, count], 1).to(torch.int32)


def _runs(
    head: _Head, tiles: int, positions: int, num_groups: int, every: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Build a list of all groups, of which each tile sees a contiguous span."""
    number = torch.arange(num_groups, device=device)
    groups = torch.stack([number, torch.full_like(number, every)], dim=1).to(torch.int32)
    first = torch.arange(tiles, device=device) * positions
    begin = ((first + head.left) // _GROUP).clamp(0, num_groups)
    end = ((first + positions - 1 + head.right) // _GROUP + 1).clamp(0, num_groups)
    return groups, torch.stack([begin, (end - begin).clamp(min=0)], dim=1).to(torch.int32)


def _pattern_bits(head: _Head, tile: Tensor, positions: int, key: Tensor) -> Tensor:
    """Compute the cell bits of tiles [n, 1] and groups with first keys [1, m], int64 [n, m]."""
    size, sees = head.block_size, head.sees
    if sees is None:
        raise InternalError("a list without a pattern has no bits")
    rows = max(1, positions // size)  # blocks of queries of a tile
    cells = min(size, positions) // _CELL
    num_groups = key.shape[1]
    column = torch.arange(-(-num_groups * _GROUP // size), device=key.device)[None, :]
    bits = torch.zeros(len(tile), column.shape[1], dtype=torch.int64, device=key.device)
    for i in range(rows):
        word = ((1 << cells) - 1) << (i * cells)
        bits += sees(tile * positions // size + i, column) * word
    if size == _CELL:
        bits = bits[:, 0::2] | bits[:, 1::2] << 16
    else:
        bits = (bits | bits << 16).repeat_interleave(size // _GROUP, dim=1)
    return bits[:, :num_groups]

"""Builds, converts, inspects, checks and draws block patterns.

A pattern is a bool tensor [rows, columns] or [heads, rows, columns], True = attend, as in
`BlockSparse`. All functions work on any device; none needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jitattn.patterns.drawing import draw, text
from jitattn.patterns.seen import heads_of
from jitattn.values.strided_blocks import sees_block

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import LocalStride

__all__ = [
    "Description",
    "describe",
    "draw",
    "from_csr",
    "from_tokens",
    "is_kv_cache_efficient",
    "local_stride",
    "sees_block",
    "text",
    "to_csr",
    "to_tokens",
]


@dataclass(frozen=True, slots=True)
class Description:
    """Statistics of a pattern."""

    heads: int
    rows: int
    columns: int
    density: float  #: fraction of blocks that are set; causal: of those up to the diagonal
    fewest: int  #: fewest blocks in a row of any head
    most: int  #: most blocks in a row of any head
    empty_rows: int  #: rows without any block, whose result is 0
    is_kv_cache_efficient: bool

    def __str__(self) -> str:
        """Format the statistics as one line."""
        return (
            f"{self.heads} x {self.rows} x {self.columns} blocks, density {self.density:.3f}, "
            f"{self.fewest} to {self.most} a row, {self.empty_rows} empty rows, kv-cache "
            f"efficient: {'yes' if self.is_kv_cache_efficient else 'no'}"
        )


def local_stride(
    rule: LocalStride,
    heads_q: int,
    heads_kv: int,
    rows: int,
    columns: int | None = None,
    *,
    first_row: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Build the explicit pattern of a local + stride mask.

    Parameters
    ----------
    rule : LocalStride
    heads_q, heads_kv : int
        Hq and Hkv.
    rows, columns : int
        Blocks of queries and of keys; as many columns as rows if left out.
    first_row : int
        Number of the first row's block, for a part of the queries.

    Returns
    -------
    Tensor, [Hkv, rows, columns], bool
        As `BlockSparse` takes it, with the block size of the rule; causal ones with
        ``causal=True``. Not causal, heads are alike: [1, rows, columns].
    """
    i = torch.arange(first_row, first_row + rows, device=device)[:, None]
    j = torch.arange(rows + first_row if columns is None else columns, device=device)[None, :]
    if not rule.causal:
        return sees_block(rule, i, j)[None]
    heads = torch.arange(heads_kv, device=device)[:, None, None]
    seen = sees_block(rule, i, j, heads * rule.step(heads_q) + rule.head_offset)
    return (seen | (heads >= heads_kv - rule.num_dense_heads)) & (j <= i)


def from_tokens(mask: Tensor, block_size: int) -> Tensor:
    """Return the pattern of blocks with any visible pair.

    Parameters
    ----------
    mask : Tensor, [..., Lq, Lkv], bool
    block_size : int

    Returns
    -------
    Tensor, [..., ceil(Lq / block_size), ceil(Lkv / block_size)], bool
    """
    rows, columns = (-(-size // block_size) for size in mask.shape[-2:])
    shape = (*mask.shape[:-2], rows * block_size, columns * block_size)
    padded = mask.new_zeros(shape)
    padded[..., : mask.shape[-2], : mask.shape[-1]] = mask
    blocks = padded.reshape(*mask.shape[:-2], rows, block_size, columns, block_size)
    return blocks.any(dim=-1).any(dim=-2)


def to_tokens(
    pattern: Tensor, block_size: int, len_q: int, len_kv: int, *, causal: bool = False
) -> Tensor:
    """Expand a pattern to pairs, [..., Lq, Lkv]; the last query is at the last key.

    Pairs outside the pattern are not set.
    """
    position = torch.arange(len_q, device=pattern.device)[:, None] + len_kv - len_q
    key = torch.arange(len_kv, device=pattern.device)[None, :]
    row, column = position.div(block_size, rounding_mode="floor"), key // block_size
    rows, columns = pattern.shape[-2:]
    inside = (row >= 0) & (row < rows) & (column < columns)
    if causal:
        inside = inside & (key <= position)
    if not rows * columns:
        return inside.expand(*pattern.shape[:-2], len_q, len_kv)
    return pattern[..., row.clamp(0, rows - 1), column.clamp(max=columns - 1)] & inside


def to_csr(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Convert to (crow, col), int32 [heads, rows + 1] and [heads, most blocks of a head].

    The columns of row r of head h are ``col[h, crow[h, r] : crow[h, r + 1]]``, ascending; unused
    entries of `col` are -1. The CSR of the transposed pattern is the CSC of the pattern.
    """
    heads = heads_of(pattern)
    counts = heads.sum(dim=2)
    crow = torch.zeros(heads.shape[0], heads.shape[1] + 1, dtype=torch.int32, device=heads.device)
    crow[:, 1:] = counts.cumsum(dim=1)
    width = int(counts.sum(dim=1).max()) if heads.numel() else 0
    col = torch.full((heads.shape[0], width), -1, dtype=torch.int32, device=heads.device)
    for head, own in enumerate(heads):
        columns = own.nonzero()[:, 1]
        col[head, : len(columns)] = columns
    return crow, col


def from_csr(crow: Tensor, col: Tensor, columns: int) -> Tensor:
    """Convert the output of `to_csr` back to a pattern [heads, rows, columns]."""
    heads, rows = crow.shape[0], crow.shape[1] - 1
    pattern = torch.zeros(heads, rows, columns, dtype=torch.bool, device=crow.device)
    for head in range(heads):
        counts = crow[head].diff().long()
        row = torch.arange(rows, device=crow.device).repeat_interleave(counts)
        pattern[head, row, col[head, : len(row)].long()] = True
    return pattern


def is_kv_cache_efficient(pattern: Tensor) -> bool:
    """Return whether a key block, once hidden from a row, stays hidden from later rows.

    Then a cache may drop the keys that a decoding head has passed. In every column below its
    diagonal, a block that is set must be set in the row before as well.
    """
    heads = heads_of(pattern)
    later, before = heads[:, 1:], heads[:, :-1]
    row = torch.arange(heads.shape[1], device=heads.device)[1:, None]
    below = torch.arange(heads.shape[2], device=heads.device)[None, :] < row
    return not bool((later & ~before & below).any())


def describe(pattern: Tensor, *, causal: bool = False) -> Description:
    """Return statistics of a pattern; `causal` counts only blocks up to the diagonal."""
    heads = heads_of(pattern)
    allowed = torch.ones(heads.shape[1:], dtype=torch.bool, device=heads.device)
    if causal:
        allowed = allowed.tril()
    heads = heads & allowed
    counts = heads.sum(dim=2)
    places = heads.shape[0] * int(allowed.sum())
    return Description(
        heads=heads.shape[0],
        rows=heads.shape[1],
        columns=heads.shape[2],
        density=float(counts.sum()) / max(1, places),
        fewest=int(counts.min()) if counts.numel() else 0,
        most=int(counts.max()) if counts.numel() else 0,
        empty_rows=int((counts == 0).sum()),
        is_kv_cache_efficient=is_kv_cache_efficient(heads),
    )

"""CPU path of rotary position embedding, differentiable in x and the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.rotary import Rotary


class Positions(NamedTuple):
    """First row and first position of each sequence."""

    offset: int  #: position of the first row of every sequence
    offsets: Tensor | None  #: [B]: position of the first row of each; replaces `offset`
    cu_seqlens: Tensor | None  #: [B + 1]; None: the tensor is [B, L, H, D], not [total, H, D]


def apply_rotary_cpu(x: Tensor, rotary: Rotary, positions: Positions) -> Tensor:
    """Rotate x [B, L, H, D], or [total, H, D] with cumulative lengths."""
    if positions.cu_seqlens is None and positions.offsets is None:
        span = slice(positions.offset, positions.offset + x.shape[1])  # within the tables
        return _turned(x, rotary.cos[span], rotary.sin[span], rotary.interleaved)
    return turned_by(x, position_of_rows(x, positions), rotary)


def position_of_rows(x: Tensor, positions: Positions) -> Tensor:
    """Return the position of each row, [B, L] or [total]; -1 for rows of no sequence."""
    cu_seqlens, offsets = positions.cu_seqlens, positions.offsets
    rows = x.shape[0 if cu_seqlens is not None else 1]
    row = torch.arange(rows, dtype=torch.int64, device=x.device)
    if cu_seqlens is None:
        return row + (positions.offset if offsets is None else offsets[:, None].long())
    starts = cu_seqlens.long()
    batch = len(starts) - 1
    if not batch:
        return torch.full_like(row, -1)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    has_sequence = (sequence >= 0) & (sequence < batch)
    sequence = sequence.clamp(0, batch - 1)
    first = positions.offset if offsets is None else offsets[sequence].long()
    return torch.where(has_sequence, row - starts[sequence] + first, -1)


def turned_by(x: Tensor, position: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x [..., L, H, D] by row positions [..., L] that are within the tables."""
    rows = rotary.cos.shape[0]
    if not rows:
        return x.clone()
    own = position.clamp(0, rows - 1)
    result = _turned(x, rotary.cos[own], rotary.sin[own], rotary.interleaved)
    exists = (position >= 0) & (position < rows)
    return torch.where(exists[..., None, None], result, x)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x [..., L, H, D] by tables [..., L, rotary_dim / 2] in fp32 (fp64 for fp64)."""
    dim = 2 * cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(dtype)[..., None, :] for table in (cos, sin))
    values = x[..., :dim].to(dtype)
    if interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
    else:
        first, second = values.chunk(2, dim=-1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., dim:]), dim=-1)

"""Rotary position embedding, in plain PyTorch: differentiable, on any device.

Su et al., "RoFormer", arXiv:2104.09864. (While keys are appended to a cache,
`flash_attn_with_kvcache` turns them in a kernel.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Return (-b, a) of the pairs (a, b): columns 2i and 2i + 1, or i and i + half."""
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Turn x [B, L, H, D] by tables [L, rotary_dim / 2] or [B, L, rotary_dim / 2]."""
    rotary_dim = 2 * cos.shape[-1]
    wide_cos, wide_sin = (_widened(table, interleaved)[..., None, :] for table in (cos, sin))
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turned * wide_cos + rotate_half(turned, interleaved) * wide_sin
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turn vectors by their positions.

    Parameters
    ----------
    x : Tensor, [B, L, H, D], or [total, H, D] with `cu_seqlens`
    cos, sin : Tensor, [positions, rotary_dim / 2]
        rotary_dim is at most D; further columns stay. fp32 tables are used as they are.
    interleaved : bool
        Columns 2i and 2i + 1 are a pair (GPT-J), rather than i and i + rotary_dim / 2 (GPT-NeoX).
    inplace : bool
        Write the result to x.
    seqlen_offsets : int or Tensor [B]
        Position of the first row of each sequence.
    cu_seqlens : Tensor, [B + 1], optional
    max_seqlen : int, optional
        Taken for the sake of callers; nothing needs it.

    Returns
    -------
    Tensor, as x

    Raises
    ------
    InvalidInputError
        The tables are too wide, or too short where that can be seen without asking the device.
    """
    del max_seqlen
    positions, rotary_dim = cos.shape[0], 2 * cos.shape[1]
    if cos.shape != sin.shape or rotary_dim > x.shape[-1]:
        raise InvalidInputError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)}: both must be [positions, "
            f"rotary_dim / 2] with rotary_dim at most {x.shape[-1]}"
        )
    if cu_seqlens is None:
        row = torch.arange(x.shape[1], device=x.device)
        if isinstance(seqlen_offsets, torch.Tensor):
            row = row + seqlen_offsets[:, None]
        elif seqlen_offsets + x.shape[1] > positions:
            raise InvalidInputError(
                f"cos has {positions} positions: rows up to {seqlen_offsets + x.shape[1]} are "
                "turned"
            )
        else:
            row = row + seqlen_offsets
    else:
        row = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
        sequence = sequence.clamp(max=max(0, cu_seqlens.shape[0] - 2))
        row = row - cu_seqlens[sequence]
        row = row + (
            seqlen_offsets[sequence] if isinstance(seqlen_offsets, torch.Tensor) else seqlen_offsets
        )
    turned = apply_rotary_emb_torch(x, cos[row], sin[row], interleaved)
    return x.copy_(turned) if inplace else turned


def _widened(table: Tensor, interleaved: bool) -> Tensor:
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)

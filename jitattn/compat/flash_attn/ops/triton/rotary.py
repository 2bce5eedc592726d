"""Rotary position embedding without autograd, under the name of the original's Triton kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.compat.flash_attn.layers.rotary import apply_rotary_emb

if TYPE_CHECKING:
    from torch import Tensor


@torch.no_grad()
def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate vectors by their positions as `apply_rotary_emb` does; `conjugate`: backwards."""
    return apply_rotary_emb(
        x,
        cos,
        -sin if conjugate else sin,
        interleaved,
        inplace,
        seqlen_offsets,
        cu_seqlens,
        max_seqlen,
    )

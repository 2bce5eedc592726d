"""Merges results of split keys in the shapes that FlashAttention 3 and 4 give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jitattn.api.merge import merge
from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def combined(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Merge results over disjoint sets of keys.

    Parameters
    ----------
    out_partial : Tensor, [S, B, L, H, Dv] or [S, total, H, Dv]
    lse_partial : Tensor, [S, B, L, H] or [S, total, H], fp32
    out : Tensor, [B, L, H, Dv] or [total, H, Dv], optional
        Room for the result.

    Returns
    -------
    out, and lse [B, L, H] or [total, H]

    Raises
    ------
    InvalidInputError
        Shapes do not fit together.
    """
    if out_partial.dim() not in (4, 5):
        raise InvalidInputError(
            f"out_partial has shape {list(out_partial.shape)}: it must be [splits, B, L, H, D] or "
            "[splits, total, H, D]"
        )
    if lse_partial.shape != out_partial.shape[:-1]:
        raise InvalidInputError(
            f"lse_partial has shape {list(lse_partial.shape)}: with out_partial "
            f"{list(out_partial.shape)} it must be {list(out_partial.shape[:-1])}"
        )
    dtype = out.dtype if out is not None and out_dtype is None else out_dtype
    merged, lse = merge(out_partial, lse_partial.transpose(-1, -2), out_dtype=dtype)
    if out is not None:
        merged = out.copy_(merged)
    return merged, lse.transpose(-1, -2)

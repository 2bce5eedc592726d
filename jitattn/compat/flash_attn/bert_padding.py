"""From padded batches to sequences one after another, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Return rows of x [rows, ...]; differentiable."""
    return x.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Put the real tokens of a batch one after another.

    Parameters
    ----------
    hidden_states : Tensor, [B, L, ...]
    attention_mask : Tensor, [B, L], bool or int
        Nonzero for tokens.
    unused_mask : Tensor, [B, L], bool or int, optional
        Nonzero for room that is kept, though no token is there.

    Returns
    -------
    hidden_states : Tensor, [total, ...]
    indices : Tensor, [total]
        Their rows among the B * L.
    cu_seqlens : Tensor, [B + 1], int32
    max_seqlen_in_batch : int
        Read from the device.
    used_seqlens_in_batch : Tensor, [B], int32
        Tokens of each sequence, without unused room.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=1, dtype=torch.int32)
    cumulative = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    indices = kept.flatten().nonzero().flatten()
    flat = index_first_axis(hidden_states.flatten(0, 1), indices)
    longest = int(lengths.max()) if len(lengths) else 0
    return flat, indices, cumulative, longest, attention_mask.sum(dim=1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put tokens back into a batch; the rest is 0.

    Parameters
    ----------
    hidden_states : Tensor, [total, ...]
    indices : Tensor, [total]
        As `unpad_input` returns them.
    batch, seqlen : int

    Returns
    -------
    Tensor, [batch, seqlen, ...]
    """
    room = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    filled = room.index_copy(0, indices, hidden_states)
    return filled.view(batch, seqlen, *hidden_states.shape[1:])

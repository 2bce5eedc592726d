"""Converts padded batches to ragged sequences, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function

if TYPE_CHECKING:
    from torch import Tensor


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Return rows of x [rows, ...]; differentiable."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Return `first_axis_dim` rows: row indices[i] is row i of values, others are 0."""
    room = values.new_zeros(first_axis_dim, *values.shape[1:])
    return room.index_copy(0, indices, values)


class IndexFirstAxis:
    """The function class of `index_first_axis`, with `apply`."""

    apply = staticmethod(index_first_axis)


class IndexPutFirstAxis:
    """The function class of `index_put_first_axis`, with `apply`."""

    apply = staticmethod(index_put_first_axis)


class IndexFirstAxisResidual(Function):
    """Selects rows of a tensor, and returns the tensor too, writable, for a residual connection."""

    @staticmethod
    def forward(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows and x; the latter shares x's memory, but is no view for autograd."""
        return x.index_select(0, indices), x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 - autograd's
        """Save the indices."""
        del output
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_residual: Tensor) -> Any:  # noqa: ANN401 - autograd's
        """Add both gradients."""
        (indices,) = ctx.saved_tensors
        return d_residual.index_add(0, indices, d_rows), None


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of x [rows, ...], and x for a residual connection; differentiable."""
    rows, residual = IndexFirstAxisResidual.apply(x, indices)  # type: ignore[no-untyped-call]
    return rows, residual


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the real tokens of a padded batch.

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


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack the real tokens of a padded batch whose rows hold several sequences.

    Parameters
    ----------
    hidden_states : Tensor, [B, L, ...]
    attention_mask_in_length : Tensor, [B, L], int
        Lengths of the sequences of each row in their order, and 0 elsewhere; they fill the row from
        its first token on.

    Returns
    -------
    hidden_states : Tensor, [total, ...]
    indices : Tensor, [total]
        Their rows among the B * L.
    cu_seqlens : Tensor, [sequences + 1], int32
    max_seqlen_in_batch : int
        Read from the device.
    """
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    cumulative = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    place = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    is_token = place < attention_mask_in_length.sum(1, keepdim=True)
    indices = is_token.flatten().nonzero().flatten()
    flat = index_first_axis(hidden_states.flatten(0, 1), indices)
    return flat, indices, cumulative, int(lengths.max()) if len(lengths) else 0


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Unpack tokens into a padded batch; padding is 0.

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
    filled = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return filled.view(batch, seqlen, *hidden_states.shape[1:])

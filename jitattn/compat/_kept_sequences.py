"""Keeps the values of where sequences lie, which the layers of a model share.

A door is handed the same tensors of indices by every layer of a model, and often in every step.
Making values of them, which checks them anew, would take longer than all else that a door does. The
values of a few calls are kept, and with them the tensors: contents are never read here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from jitattn.values.sequences import Paged, Ragged
from jitattn.values.tensors import PLAIN, is_transformed

if TYPE_CHECKING:
    from torch import Tensor

#: Shape and strides.
_Form: TypeAlias = tuple[torch.Size, tuple[int, ...]]
#: Sequences of queries and of keys.
Both: TypeAlias = tuple[Ragged, Ragged | Paged]

#: Few, as they hold memory of the caller's.
_MOST_KEPT: Final = 4
#: By the tensors' identities, which are theirs alone while the values hold them, and by the bounds:
#: the values, and shapes and strides, which `resize_` and the like change.
_kept: dict[tuple[int, ...], tuple[Both, _Form, _Form, _Form | None]] = {}


def sequences_of(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest_q: int,
    longest_k: int,
    block_table: Tensor | None = None,
) -> Both:
    """Return values of cumulative lengths, kept ones where the tensors are those of a call before.

    Raises
    ------
    InvalidInputError
        A tensor has an invalid dtype, shape or device, or the tensors do not match.
    """
    if torch.compiler.is_compiling():
        return _made(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, block_table)
    key = (id(cu_seqlens_q), id(cu_seqlens_k), longest_q, longest_k, id(block_table))
    known = _kept.get(key)
    if known is not None:
        found, of_q, of_k, of_table = known
        if (
            (cu_seqlens_q.shape, cu_seqlens_q.stride()) == of_q
            and (
                cu_seqlens_k is cu_seqlens_q or (cu_seqlens_k.shape, cu_seqlens_k.stride()) == of_k
            )
            and (block_table is None or (block_table.shape, block_table.stride()) == of_table)
        ):
            return found
    found = _made(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, block_table)
    if (
        may_be_kept(cu_seqlens_q)
        and (cu_seqlens_k is cu_seqlens_q or may_be_kept(cu_seqlens_k))
        and (block_table is None or may_be_kept(block_table))
    ):
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        of_table = None if block_table is None else form_of(block_table)
        _kept[key] = found, form_of(cu_seqlens_q), form_of(cu_seqlens_k), of_table
    return found


def _made(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest_q: int,
    longest_k: int,
    block_table: Tensor | None,
) -> Both:
    q_seqs = Ragged.from_cu_seqlens(cu_seqlens_q, longest_q)
    if block_table is not None:
        return q_seqs, Paged.from_cu_seqlens(block_table, cu_seqlens_k, longest_k)
    if cu_seqlens_k is cu_seqlens_q and longest_k == longest_q:
        return q_seqs, q_seqs
    return q_seqs, Ragged.from_cu_seqlens(cu_seqlens_k, longest_k)


def form_of(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Return shape and strides, which operations in place may change."""
    return tensor.shape, tensor.stride()


def may_be_kept(tensor: Tensor) -> bool:
    """Return whether a tensor may outlive a call: none of a transform, or of a graph's capture."""
    if type(tensor) not in PLAIN or is_transformed(tensor):
        return False
    return tensor.get_device() < 0 or not torch.cuda.is_current_stream_capturing()

"""Translates packed and padded sequences to arguments of `attention`.

Lengths on the host are checked. Lengths on a GPU are never synchronized: the host uses bounds, and
the kernels read the lengths.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from jitattn.compat._errors import CheckFailedError
from jitattn.compat._transfer import on_device
from jitattn.compat.dkernel._checks import check_paddings
from jitattn.errors import InvalidInputError
from jitattn.values.sequences import Padded, Ragged

if TYPE_CHECKING:
    from torch import Tensor


class Placed(NamedTuple):
    """The sequence arguments of `attention`."""

    q_seqs: Ragged | Padded | None
    kv_seqs: Ragged | Padded
    longest_kv: int | None  #: keys of the longest sequence, if known
    tile_rows: int | None = None


def packed(
    totals: tuple[int, int],
    heads: tuple[int, int],
    room: int,
    cu_seqlen_q: Tensor | None,
    cu_seqlen_k: Tensor | None,
    longest: tuple[int | None, int | None],
    device: torch.device,
) -> Placed:
    """Translate packed sequences.

    Parameters
    ----------
    totals, heads : (int, int)
        Tokens of all sequences, and heads, of q and of k.
    room : int
        Tokens that the pattern has room for.
    cu_seqlen_q, cu_seqlen_k : Tensor, [B + 1]
    longest : (int or None, int or None)
        Bounds on the lengths of q and of k, as the caller knows them.
    device : torch.device
        Of q.

    Raises
    ------
    CheckFailedError, InvalidInputError
    """
    if cu_seqlen_k is None:
        raise CheckFailedError("cu_seqlen_k is None: 3-D tensors need it")
    longest_q, longest_kv = longest
    if longest_q is not None:
        _check_bound("max_seqlen_q", longest_q, room)
    if longest_kv is not None:
        _check_bound("max_seqlen_k", longest_kv, room)
    total_q, total_kv = totals
    batch = cu_seqlen_k.numel() - 1
    if cu_seqlen_q is not None and cu_seqlen_q.numel() != batch + 1:
        raise CheckFailedError(
            f"cu_seqlen_q has {cu_seqlen_q.numel()} entries and cu_seqlen_k {batch + 1}: both "
            "need one more than there are sequences"
        )
    lengths_q, lengths_kv = None, _on_host(cu_seqlen_k)
    cu_k = on_device("cu_seqlen_k", cu_seqlen_k, device)
    if cu_seqlen_q is not None:
        lengths_q = _on_host(cu_seqlen_q)
        cu_q = on_device("cu_seqlen_q", cu_seqlen_q, device)
    elif total_q == batch:
        cu_q, longest_q = torch.arange(batch + 1, dtype=cu_k.dtype, device=device), 1
    elif total_q == total_kv:
        cu_q, lengths_q = cu_k, lengths_kv
        longest_q = longest_kv if longest_q is None else longest_q
    else:
        raise InvalidInputError(
            f"q has {total_q} rows: without cu_seqlen_q it must have one for each of the "
            f"{batch} sequences, or as many as k, {total_kv}"
        )
    if lengths_kv is not None:
        longest_kv = max((0, *lengths_kv))
        if longest_kv > room:
            raise CheckFailedError(
                f"cu_seqlen_k has a sequence of {longest_kv} tokens: the pattern has room for "
                f"{room}"
            )
    if lengths_q is not None:
        longest_q = max((0, *lengths_q))
        _check_lengths(lengths_q, lengths_kv)
    tile_rows = None
    if longest_q is None and not torch.compiler.is_compiling():
        tile_rows = _usual_rows(total_q, batch, heads[0] // max(1, heads[1]))
    bound = room if longest_kv is None else longest_kv
    kv_seqs = Ragged.from_cu_seqlens(cu_k, bound)
    q_seqs = kv_seqs
    if cu_q is not cu_k or longest_q not in (None, bound):
        # No sequence has more queries than keys, or it has one query.
        q_seqs = Ragged.from_cu_seqlens(cu_q, max(1, bound) if longest_q is None else longest_q)
    return Placed(q_seqs, kv_seqs, longest_kv, tile_rows)


def padded(
    len_q: int,
    len_kv: int,
    left_paddings: Tensor | None,
    seqlens: Tensor | None,
    device: torch.device,
) -> Placed:
    """Translate padded sequences, given at least one of the two tensors.

    Raises
    ------
    CheckFailedError
    """
    if len_q > max(1, len_kv):
        raise CheckFailedError(
            f"q has {len_q} tokens and k {len_kv}: with left_paddings or seqlens, queries are "
            "the last tokens of their sequences, of which there must be as many"
        )
    check_paddings(left_paddings, seqlens, len_kv)
    left = None if left_paddings is None else on_device("left_paddings", left_paddings, device)
    if seqlens is not None:
        length = on_device("seqlens", seqlens, device)
        left = None if left is None else left.to(length.dtype)
    elif left is not None:
        length = len_kv - left
    kv_seqs = Padded(length, left)
    return Placed(kv_seqs if len_q == len_kv else None, kv_seqs, len_kv)


def _check_bound(name: str, bound: int, room: int) -> None:
    if type(bound) is not int or not 0 <= bound <= room:
        raise CheckFailedError(
            f"{name}={bound!r}: it must be an int from 0 to what the pattern has room for, {room}"
        )


def _on_host(cu_seqlens: Tensor) -> list[int] | None:
    """Return the lengths of sequences if they are on the host; None otherwise."""
    if cu_seqlens.is_cuda or torch.compiler.is_compiling():
        return None
    return [stop - start for start, stop in pairwise(cu_seqlens.tolist())]


def _check_lengths(lengths_q: list[int], lengths_kv: list[int] | None) -> None:
    if lengths_kv is None:
        return
    for idx, (len_q, len_kv) in enumerate(zip(lengths_q, lengths_kv, strict=True)):
        if len_q > max(1, len_kv):
            raise CheckFailedError(
                f"sequence {idx} has {len_q} queries and {len_kv} keys: packed queries are the "
                "last tokens of their sequence, of which there must be as many"
            )


def _usual_rows(total: int, batch: int, group: int) -> int | None:
    """Choose the tile rows by the mean sequence length; None selects the tile of long ones."""
    rows = -(-total // max(1, batch)) * group
    return 16 if rows <= 16 else 64 if rows <= 64 else None

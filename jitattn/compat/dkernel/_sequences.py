"""Translates packed and padded sequences to arguments of `attention`.

Lengths on the host are checked. Lengths on a GPU are never synchronized: the host uses bounds, and
the kernels read the lengths.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch

from jitattn.compat._errors import CheckFailedError
from jitattn.compat._kept_sequences import form_of, may_be_kept
from jitattn.compat.dkernel._checks import check_indices, check_paddings
from jitattn.errors import InvalidInputError
from jitattn.values.sequences import Padded, Ragged
from jitattn.values.transfer import on_device

if TYPE_CHECKING:
    from torch import Tensor


#: Calls whose values are kept: few, as they hold memory of the caller's.
_MOST_KEPT: Final = 4
_BOUNDS: Final = (int, type(None))

#: cu_seqlen_k, cu_seqlen_q, left_paddings and seqlens.
Where: TypeAlias = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]


class Sizes(NamedTuple):
    """Sizes of a call on which values of its sequences depend."""

    is_packed: bool
    batch: int  #: 0 where packed
    len_q: int  #: tokens of a sequence, or of all where packed
    len_kv: int
    heads_q: int
    heads_kv: int
    room: int  #: tokens that the pattern has room for
    device: torch.device  #: of q


class Placed(NamedTuple):
    """The sequence arguments of `attention`."""

    q_seqs: Ragged | Padded | None
    kv_seqs: Ragged | Padded
    longest_kv: int | None  #: keys of the longest sequence, if known
    tile_rows: int | None = None


#: By the tensors' identities, which are theirs alone while the values hold them, by bounds and
#: sizes: the values, and numbers of elements, which `resize_` changes.
_kept: dict[tuple[object, ...], tuple[Placed, list[Any]]] = {}


def placed(sizes: Sizes, where: Where, longest: tuple[int | None, int | None], q: Tensor) -> Placed:
    """Translate packed or padded sequences, of the same tensors on a GPU only once.

    Parameters
    ----------
    longest : (int or None, int or None)
        Bounds on the lengths of q and of k, as the caller knows them; only of packed sequences.

    Raises
    ------
    CheckFailedError, InvalidInputError
    """
    longest_q, longest_kv = longest
    if torch.compiler.is_compiling() or not (
        type(longest_q) in _BOUNDS and type(longest_kv) in _BOUNDS
    ):
        return _translated(sizes, where, longest, q)
    cu_k, cu_q, left, seqlens = where
    key = (id(cu_k), id(cu_q), id(left), id(seqlens), longest_q, longest_kv, sizes)
    known = _kept.get(key)
    if known is not None:
        found, (of_cu_k, of_cu_q, of_left, of_seqlens) = known
        if (
            (cu_k is None or (cu_k.shape, cu_k.stride()) == of_cu_k)
            and (cu_q is None or (cu_q.shape, cu_q.stride()) == of_cu_q)
            and (left is None or (left.shape, left.stride()) == of_left)
            and (seqlens is None or (seqlens.shape, seqlens.stride()) == of_seqlens)
        ):
            return found
    found = _translated(sizes, where, longest, q)
    if _holds_just(found, cu_k, cu_q, left, seqlens):
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        _kept[key] = found, [None if x is None else form_of(x) for x in where]
    return found


def _holds_just(
    found: Placed,
    cu_k: Tensor | None,
    cu_q: Tensor | None,
    left: Tensor | None,
    seqlens: Tensor | None,
) -> bool:
    """Return whether values hold the given tensors and no others, made of their contents.

    Tensors on the host are checked in every call.
    """
    one = cu_k if seqlens is None else seqlens
    if one is None or not one.is_cuda or not may_be_kept(one):
        return False
    q_seqs, kv_seqs = found.q_seqs, found.kv_seqs
    if cu_k is None:
        return kv_seqs._stop is seqlens and kv_seqs._start is left
    own_q = cu_k if cu_q is None else cu_q
    return kv_seqs.cumulative is cu_k and q_seqs is not None and q_seqs.cumulative is own_q


def bounds_of_a_batch() -> CheckFailedError:
    """Return the error of bounds that are given with 4-D tensors."""
    return CheckFailedError(
        "max_seqlen_q or max_seqlen_k is given and q is 4-D: they go with 3-D tensors; "
        "lengths of 4-D ones are in seqlens"
    )


def _translated(
    sizes: Sizes, where: Where, longest: tuple[int | None, int | None], q: Tensor
) -> Placed:
    check_indices(where, q)
    cu_k, cu_q, left, seqlens = where
    if sizes.is_packed:
        return _packed(sizes, cu_q, cu_k, longest)
    if longest != (None, None):
        raise bounds_of_a_batch()
    return _padded(sizes, left, seqlens)


def _packed(
    sizes: Sizes,
    cu_seqlen_q: Tensor | None,
    cu_seqlen_k: Tensor | None,
    longest: tuple[int | None, int | None],
) -> Placed:
    """Translate packed sequences.

    Raises
    ------
    CheckFailedError, InvalidInputError
    """
    device, room = sizes.device, sizes.room
    if cu_seqlen_k is None:
        raise CheckFailedError("cu_seqlen_k is None: 3-D tensors need it")
    longest_q, longest_kv = longest
    if longest_q is not None:
        _check_bound("max_seqlen_q", longest_q, room)
    if longest_kv is not None:
        _check_bound("max_seqlen_k", longest_kv, room)
    total_q, total_kv = sizes.len_q, sizes.len_kv
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
        tile_rows = _usual_rows(total_q, batch, sizes.heads_q // max(1, sizes.heads_kv))
    bound = room if longest_kv is None else longest_kv
    kv_seqs = Ragged.from_cu_seqlens(cu_k, bound)
    q_seqs = kv_seqs
    if cu_q is not cu_k or longest_q not in (None, bound):
        # No sequence has more queries than keys, or it has one query.
        q_seqs = Ragged.from_cu_seqlens(cu_q, max(1, bound) if longest_q is None else longest_q)
    return Placed(q_seqs, kv_seqs, longest_kv, tile_rows)


def _padded(sizes: Sizes, left_paddings: Tensor | None, seqlens: Tensor | None) -> Placed:
    """Translate padded sequences, given at least one of the two tensors.

    Raises
    ------
    CheckFailedError
    """
    len_q, len_kv, device = sizes.len_q, sizes.len_kv, sizes.device
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

"""Translates FlashAttention's arguments and results to jitattn's, and back."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Final

import torch

from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.reference import Scores, attended
from jitattn.values.autocast import outside_autocast
from jitattn.values.dropout import dropout_mask
from jitattn.values.masks import Causal, Full, Window
from jitattn.values.sequences import Paged, Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from jitattn.values.masks import Mask

#: The core's argument names in error messages, and these functions'.
WORDS: Final = {
    "scale": "softmax_scale",
    "q_seqs": "cu_seqlens_q",
    "kv_seqs": "cu_seqlens_k",
    "check the layout argument": "the layout is [B, L, H, D]",
}
CACHE_WORDS: Final = {
    **WORDS,
    "length": "cache_seqlens",
    "batch_idx": "cache_batch_idx",
    "left_pad": "cache_leftpad",
    "Rotary": "rotary_cos and rotary_sin",
}
_NO_WINDOW: Final = (-1, -1)
_FULL: Final = Full()
_CAUSAL: Final = Causal()
_NAN: Final = float("nan")
_INFINITY: Final = float("inf")
#: Key block size by which the running maximum in S_dmask is updated.
DMASK_BLOCK: Final = 64
#: Lq and Lkv of S_dmask are multiples of this.
_DMASK_UNIT: Final = 128


def plain_mask(causal: bool, window_size: Sequence[int], keep_first: int) -> Mask | None:
    """Return the mask of a call without a window; None if `mask_of` must decide.

    The usual call, whose lengths need not be looked at.
    """
    if type(keep_first) is int and type(window_size) is tuple and window_size == _NO_WINDOW:
        return None if keep_first < 0 else _CAUSAL if causal else _FULL
    return None


def mask_of(
    causal: bool,
    window_size: Sequence[int],
    keep_first: int,
    force_fa_decode: bool,
    longest: tuple[int, int] | None,
) -> Mask:
    """Return the mask of a call; without a left bound `keep_first` and the like have no effect.

    Parameters
    ----------
    longest : (int, int), optional
        Largest lengths of queries and of keys: with more queries than keys, a reach to the right
        over all keys is no bound there. A causal rule needs none.

    Raises
    ------
    InvalidInputError
        `window_size` or `keep_first` is of another kind.
    """
    if not isinstance(keep_first, int) or keep_first < 0:
        raise InvalidInputError(f"keep_first={keep_first!r}: it must be an int, 0 for none")
    if type(window_size) is tuple and window_size == _NO_WINDOW:
        return _CAUSAL if causal else _FULL
    try:
        left, right = window_size
        left, right = operator.index(left), operator.index(right)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"window_size={window_size!r}: it must be two ints (left, right), -1 for no bound"
        ) from error
    if causal:
        right = 0
    elif longest is not None and right >= longest[1] and longest[0] > longest[1]:
        right = -1
    if left < 0:
        if right <= 0:
            return _FULL if right < 0 else _CAUSAL
        left = -1
    # Masks are values: equal arguments share one. (`torch.compile` would trace through a cache.)
    make = _window if torch.compiler.is_compiling() else _shared_window
    return make(left, max(right, -1), int(keep_first), bool(force_fa_decode))


def _window(left: int, right: int, keep_first: int, full_on_decode: bool) -> Window:
    if left < 0:
        return Window(None, right)
    return Window(left, None if right < 0 else right, keep_first, full_on_decode)


_shared_window: Final = functools.lru_cache(maxsize=256)(_window)


def lengths_of(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Return Lq and Lkv of a batch; invalid inputs are refused later."""
    return (q.shape[1], k.shape[1]) if q.dim() == k.dim() == 4 else (0, 0)


def in_rows(x: Tensor) -> Tensor:
    """Return a tensor with contiguous columns, copied if necessary, as the original does.

    What has no strides is refused later.
    """
    try:
        return x if x.is_contiguous() or x.stride()[-1] == 1 else x.contiguous()
    except RuntimeError:
        return x


def all_in_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `in_rows` to three tensors."""
    try:
        if q.is_contiguous() and k.is_contiguous() and v.is_contiguous():
            return q, k, v
        if q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1:
            return q, k, v
    except (IndexError, RuntimeError):  # no dimensions, or no strides
        pass
    return in_rows(q), in_rows(k), in_rows(v)


def keys_of(
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Ragged | Paged:
    """Return the key sequences of a call.

    Raises
    ------
    InvalidInputError
        `leftpad_k` and `block_table` are given together.
    """
    longest = int(max_seqlen_k)
    if block_table is not None:
        if leftpad_k is not None:
            raise InvalidInputError("leftpad_k and block_table: pages begin with keys")
        if seqused_k is None:
            return Paged.from_cu_seqlens(block_table, cu_seqlens_k, longest)
        return Paged(block_table, seqused_k, longest)
    if seqused_k is None and leftpad_k is None:
        return Ragged.from_cu_seqlens(cu_seqlens_k, longest)
    start = cu_seqlens_k[:-1]
    lengths = cu_seqlens_k[1:] - start if seqused_k is None else seqused_k
    if leftpad_k is not None:
        start, lengths = start + leftpad_k, lengths - leftpad_k
    return Ragged(start, lengths, longest)


def their_lse(lse: Tensor) -> Tensor:
    """Return the LSE in FlashAttention's convention: +inf for rows that see no key."""
    return lse.nan_to_num(_NAN, _INFINITY, _INFINITY)


def into_their_lse(lse: Tensor) -> Tensor:
    """Convert an unshared LSE without gradient to FlashAttention's convention, in place."""
    return torch.threshold_(lse, -_INFINITY, _INFINITY)


def our_lse(lse: Tensor) -> Tensor:
    """Return the LSE in jitattn's convention: -inf for rows that see no key."""
    return lse.nan_to_num(_NAN, -_INFINITY, -_INFINITY)


def rounded_up(length: int) -> int:
    """Round a length up as S_dmask does."""
    return -(-length // _DMASK_UNIT) * _DMASK_UNIT


@torch.no_grad()
@outside_autocast
def s_dmask(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    sizes: tuple[int, int],
    mask: Mask,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    state: Tensor,
) -> Tensor:
    """Compute S_dmask, the original's test output: weights, negative where dropped.

    A weight is exp(score - m), where m is the largest score of its row from the `DMASK_BLOCK` keys
    that it is among to the last key: blocks are visited from the right. Plain PyTorch, and a
    Lq x Lkv tensor, as there.

    Parameters
    ----------
    queries, keys : Tensor [Lq, Hq, D] and [Lkv, Hkv, D] of each sequence
    sizes : (int, int)
        The largest lengths.
    state : Tensor, int64 [2]
        Of the dropout.

    Returns
    -------
    Tensor, [B, Hq, Lq, Lkv], dtype of q; lengths rounded up to multiples of 128, filled with 0
    """
    heads = queries[0].shape[1]
    shape = (len(queries), heads, *(rounded_up(size) for size in sizes))
    result = queries[0].new_zeros(shape)
    stays = dropout_mask(state, dropout_p, len(queries), heads, *sizes)
    changes = Scores(alibi_slopes=alibi_slopes, softcap=softcap)
    for idx, (q, k) in enumerate(zip(queries, keys, strict=True)):
        len_q, len_kv = len(q), len(k)
        if not len_q or not len_kv:
            continue
        wide_k = k.float().transpose(0, 1).repeat_interleave(heads // k.shape[1], 0)
        scores = torch.matmul(q.float().transpose(0, 1), wide_k.transpose(1, 2))
        scores = scores * (q.shape[2] ** -0.5 if scale is None else scale)
        scores = changes.of_sequence(idx).apply(scores[None])[0]
        seen = attended(mask, 1, heads, k.shape[1], len_q, len_kv, device=q.device)[0]
        scores = scores.masked_fill(~seen, float("-inf"))
        room = -len_kv % DMASK_BLOCK
        blocks = torch.nn.functional.pad(scores, (0, room), value=float("-inf"))
        blocks = blocks.reshape(heads, len_q, -1, DMASK_BLOCK)
        highest = blocks.amax(3).flip(2).cummax(2).values.flip(2)[..., None]
        weights = torch.exp(blocks - highest).masked_fill(torch.isneginf(blocks), 0.0)
        weights = weights.flatten(2)[..., :len_kv]
        weights = torch.where(stays[idx, :, :len_q, :len_kv], weights, -weights)
        result[idx, :, :len_q, :len_kv] = weights.to(q.dtype)
    return result


def dmask_of(
    q: Tensor,
    k: Tensor,
    mask: Mask,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    state: Tensor,
    q_seqs: Ragged | None = None,
    kv_seqs: Ragged | Paged | None = None,
) -> Tensor:
    """Compute S_dmask of a call of `attention` with dropout."""
    sizes = q.shape[1], k.shape[1]
    if isinstance(q_seqs, Ragged) and isinstance(kv_seqs, Ragged):
        sizes = q_seqs.max_length(), kv_seqs.max_length()
    return s_dmask(
        parts_of(q.detach(), q_seqs),
        parts_of(k.detach(), kv_seqs),
        sizes,
        mask,
        scale,
        softcap or None,
        alibi_slopes,
        dropout_p,
        state,
    )


def parts_of(x: Tensor, seqs: Ragged | Paged | None) -> list[Tensor]:
    """Return the rows of each sequence, [L, H, D]; synchronizes to read lengths."""
    if isinstance(seqs, Paged):
        raise UnsupportedError(
            "return_attn_probs with dropout and block_table: S_dmask is computed of keys that lie "
            "one after another; gather the pages first"
        )
    if seqs is None or seqs.start is None:
        return list(x)
    spans = zip(seqs.start.tolist(), seqs.length.tolist(), strict=True)
    return [x[start : start + length] for start, length in spans]

"""`flash_attn_with_kvcache`, translated to `jitattn.attention_with_kvcache`."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from jitattn.api.kvcache import attention_with_kvcache
from jitattn.compat._errors import DoorError, ExtensionError, in_words
from jitattn.compat.flash_attn._kept_rotary import rotary_of
from jitattn.compat.flash_attn._translate import (
    CACHE_WORDS,
    all_in_rows,
    in_rows,
    into_their_lse,
    mask_of,
    plain_mask,
    their_lse,
)
from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:  # noqa: ANN401 - Tensor, or two
    """Append k and v to a cache in place, and attend to it; no gradients.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D]
    k_cache, v_cache : Tensor, [Bc, Lc, Hkv, D], or [num_pages, page_size, Hkv, D]
    k, v : Tensor, [B, num_new, Hkv, D], optional
    rotary_cos, rotary_sin : Tensor, [rows, rotary_dim / 2], optional
        Turn the new keys and the queries by their positions.
    cache_seqlens : int or Tensor [B], optional
        Rows of the cache in use; without it, all are, and nothing can be appended.
    cache_batch_idx : Tensor, [B], optional
        Rows of the cache, not with `block_table`.
    cache_leftpad : Tensor, [B], optional
    block_table : Tensor, [B, max_pages], optional
    num_splits : int, 0 to choose
    rotary_interleaved : bool
        Turn columns 2i and 2i + 1 with each other, rather than i and i + rotary_dim / 2.
    return_softmax_lse : bool

    The others are those of `flash_attn_func`.

    Returns
    -------
    Tensor, [B, Lq, Hq, D], or (out, lse)
    """
    try:
        out, lse = with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens,
            rotary_cos,
            rotary_sin,
            cache_batch_idx,
            cache_leftpad,
            block_table,
            alibi_slopes,
            None,
            softmax_scale,
            causal,
            window_size,
            softcap,
            keep_first,
            force_fa_decode,
            rotary_interleaved,
            num_splits,
            return_lse=return_softmax_lse,
        )
    except DoorError:
        raise
    except InvalidInputError as error:
        raise ExtensionError(in_words(error, CACHE_WORDS)) from error
    return (out, lse) if return_softmax_lse else out


def with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor | int | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    keep_first: int,
    force_fa_decode: bool,
    rotary_interleaved: bool,
    num_splits: int,
    *,
    return_lse: bool,
) -> tuple[Tensor, Any]:
    """Append and attend: (out, lse), without an LSE unless `return_lse`."""
    if (rotary_cos is None) != (rotary_sin is None):
        raise InvalidInputError("rotary_cos and rotary_sin: give both, or neither")
    rotary = None
    if rotary_cos is not None and rotary_sin is not None:
        rotary = rotary_of(rotary_cos, rotary_sin, bool(rotary_interleaved))
    if cache_seqlens is None:
        if k is not None:
            raise InvalidInputError("k and v need cache_seqlens: where in the cache do they go?")
        cache_seqlens = _room(k_cache, block_table)
    elif not isinstance(cache_seqlens, torch.Tensor):
        cache_seqlens = operator.index(cache_seqlens)
    if k is None or v is None:
        q = in_rows(q)
    else:
        q, k, v = all_in_rows(q, k, v)
    if cache_batch_idx is not None:
        cache_batch_idx = in_rows(cache_batch_idx)
    if block_table is not None:
        block_table = in_rows(block_table)
    mask = plain_mask(causal, window_size, keep_first)
    if mask is None:
        longest = None if causal else (q.shape[1], _room(k_cache, block_table))
        mask = mask_of(causal, window_size, keep_first, force_fa_decode, longest)
    if torch.is_grad_enabled() and are_followed(q, k_cache, v_cache, k, v):
        attend = torch.no_grad()(attention_with_kvcache)
    else:
        attend = attention_with_kvcache
    found: Any = attend(
        q,
        k_cache,
        v_cache,
        k,
        v,
        length=cache_seqlens,
        rotary=rotary,
        left_pad=cache_leftpad,
        batch_idx=cache_batch_idx,
        block_table=block_table,
        mask=mask,
        scale=softmax_scale,
        out=out,
        num_splits=num_splits or None,
        return_lse=return_lse,
        alibi_slopes=alibi_slopes,
        softcap=softcap or None,
    )
    if not return_lse:
        return found, None
    result, lse = found
    # Only alibi_slopes may have a gradient here; then autograd has saved the LSE.
    return result, their_lse(lse) if lse.requires_grad else into_their_lse(lse)


def are_followed(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None
) -> bool:
    """Return whether a tensor that the call could have a gradient of requires one."""
    return (
        q.requires_grad
        or k_cache.requires_grad
        or v_cache.requires_grad
        or (k is not None and k.requires_grad)
        or (v is not None and v.requires_grad)
    )


def _room(k_cache: Tensor, block_table: Tensor | None) -> int:
    """Return the cache capacity of a sequence, in rows."""
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])

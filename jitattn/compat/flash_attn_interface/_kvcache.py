"""FlashAttention 3's `flash_attn_with_kvcache`, translated to `jitattn.attention_with_kvcache`."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from jitattn.api.kvcache import attention_with_kvcache
from jitattn.compat._errors import ExtensionError, check, errors_as
from jitattn.compat.flash_attn._kept_rotary import rotary_of
from jitattn.compat.flash_attn._kvcache import are_followed
from jitattn.compat.flash_attn._translate import all_in_rows, in_rows
from jitattn.compat.flash_attn_interface._translate import CACHE_WORDS, refuse, rule_of
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from torch import Tensor


@errors_as(ExtensionError, CACHE_WORDS)
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:  # noqa: ANN401 - Tensor, or two
    """Append k and v to a cache in place, and attend to it; no gradients.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D], or [total, Hq, D] with `cu_seqlens_q`
    k_cache : Tensor, [Bc, Lc, Hkv, D], or [num_pages, page_size, Hkv, D] with `page_table`
    v_cache : Tensor, likewise with Dv
    k, v : Tensor, [B, num_new, Hkv, D] and Dv, or [total, Hkv, D], optional
    rotary_cos, rotary_sin : Tensor, [rows, rotary_dim / 2], optional
        Turn the new keys and the queries by their positions.
    cache_seqlens : int or Tensor [B], optional
        Rows of the cache in use; without it, all are, and nothing can be appended.
    cache_batch_idx : Tensor, [B], optional
        Rows of the cache, not with `page_table`.
    cache_leftpad : Tensor, [B], optional
    page_table : Tensor, [B, max_pages], optional
    cu_seqlens_q, max_seqlen_q : Tensor [B + 1] and int, optional
        Queries of sequences one after another.
    cu_seqlens_k_new : Tensor, optional
        Of k and v; it must be `cu_seqlens_q` itself.
    rotary_seqlens : Tensor, optional
        It must be `cache_seqlens` itself.
    qv, q_descale, k_descale, v_descale
        Refused.
    scheduler_metadata, num_splits, pack_gqa, sm_margin
        Steer the original's speed; no effect.
    rotary_interleaved : bool
        Turn columns 2i and 2i + 1 with each other, rather than i and i + rotary_dim / 2.
    return_softmax_lse : bool

    The others are those of `flash_attn_func`.

    Returns
    -------
    Tensor, as q with Dv columns, or (out, lse): [B, Hq, Lq] or [Hq, total], -inf for rows that see
    nothing
    """
    del scheduler_metadata, num_splits, pack_gqa, sm_margin
    if qv is not None or q_descale is not None or k_descale is not None or v_descale is not None:
        refuse(qv, q_descale, k_descale, v_descale)
    rule = rule_of(causal, window_size, attention_chunk)
    rotary = None
    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None:
            raise InvalidInputError("rotary_cos and rotary_sin: give both, or neither")
        if rotary_seqlens is not None and rotary_seqlens is not cache_seqlens:
            raise UnsupportedError(
                "rotary_seqlens is given: queries are turned by the positions that cache_seqlens "
                "says; turn q and k before the call, with jitattn.apply_rotary"
            )
        rotary = rotary_of(rotary_cos, rotary_sin, bool(rotary_interleaved))
    q_seqs = _sequences(k, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q)
    if cache_seqlens is None:
        if k is not None:
            raise InvalidInputError("k and v need cache_seqlens: where in the cache do they go?")
        cache_seqlens = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    elif not isinstance(cache_seqlens, torch.Tensor):
        cache_seqlens = operator.index(cache_seqlens)
    if k is None or v is None:
        q = in_rows(q)
    else:
        q, k, v = all_in_rows(q, k, v)
    attend = attention_with_kvcache
    if torch.is_grad_enabled() and are_followed(q, k_cache, v_cache, k, v):
        attend = torch.no_grad()(attention_with_kvcache)
    return attend(
        q,
        k_cache,
        v_cache,
        k,
        v,
        length=cache_seqlens,
        rotary=rotary,
        left_pad=cache_leftpad,
        batch_idx=None if cache_batch_idx is None else in_rows(cache_batch_idx),
        block_table=None if page_table is None else in_rows(page_table),
        mask=rule,
        scale=softmax_scale,
        q_seqs=q_seqs,
        softcap=softcap or None,
        return_lse=bool(return_softmax_lse),
    )


def _sequences(
    k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    max_seqlen_q: int | None,
) -> Ragged | None:
    """Return the sequences of the queries, which those of new keys must be too."""
    if k is not None and cu_seqlens_k_new is not cu_seqlens_q:
        raise UnsupportedError(
            "cu_seqlens_k_new is not cu_seqlens_q: new keys must be those of the queries' tokens; "
            "pass one tensor as both"
        )
    if cu_seqlens_q is None:
        return None
    check(max_seqlen_q is not None, "max_seqlen_q must be given with cu_seqlens_q")
    return Ragged.from_cu_seqlens(cu_seqlens_q, max_seqlen_q)

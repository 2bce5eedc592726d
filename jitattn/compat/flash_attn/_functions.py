"""FlashAttention's functions, translated to `jitattn.attention`.

All of them: fp16, bf16 or fp32; Hq a multiple of Hkv; `window_size` (left, right) in keys beside a
query's own, -1 for no bound, `causal` sets right to 0; both aligned to the bottom right. With
`return_attn_probs` the result is (out, lse, S_dmask): lse [B, Hq, Lq] or [Hq, total], +inf for rows
that see nothing, and S_dmask [B, Hq, Lq, Lkv], lengths rounded up to 128, as the original's tests
want it; without dropout it is empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jitattn.compat._core import attention
from jitattn.compat._errors import ExtensionError, errors_as
from jitattn.compat._kept_sequences import sequences_of
from jitattn.compat.flash_attn._translate import (
    WORDS,
    all_in_rows,
    dmask_of,
    keys_of,
    lengths_of,
    mask_of,
    plain_mask,
    their_lse,
)
from jitattn.values.dropout import dropout_state
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask
    from jitattn.values.sequences import Paged


@errors_as(ExtensionError, WORDS)
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # noqa: ANN401 - Tensor, or three
    """Compute attention; differentiable.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D]
    k, v : Tensor, [B, Lkv, Hkv, D]
    dropout_p : float
    softmax_scale : float, default 1 / sqrt(D)
    causal : bool
    window_size : (int, int)
    softcap : float, 0 for none
    keep_first : int
        First keys that a window lets every query see (but for those after it).
    force_fa_decode : bool
        Let sequences with one query see all keys to the left, whatever the window.
    alibi_slopes : Tensor, [Hq] or [B, Hq], fp32, optional
    deterministic : bool
        Of the backward pass.
    return_attn_probs : bool

    Returns
    -------
    Tensor, [B, Lq, Hq, D], or three with `return_attn_probs`
    """
    rule = plain_mask(causal, window_size, keep_first)
    if rule is None:
        longest = None if causal else lengths_of(q, k)
        rule = mask_of(causal, window_size, keep_first, force_fa_decode, longest)
    return _attend(
        q,
        k,
        v,
        rule,
        dropout_p,
        softmax_scale,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # noqa: ANN401
    """Compute `flash_attn_func` of kv [B, Lkv, 2, Hkv, D], without a copy."""
    k, v = kv.unbind(-3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        keep_first,
        force_fa_decode,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # noqa: ANN401
    """Compute `flash_attn_func` of qkv [B, L, 3, H, D], without a copy."""
    q, k, v = qkv.unbind(-3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        keep_first,
        force_fa_decode,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@errors_as(ExtensionError, WORDS)
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Any:  # noqa: ANN401
    """Compute attention of sequences one after another; differentiable, through pages too.

    Parameters
    ----------
    q : Tensor, [total_q, Hq, D]
    k, v : Tensor, [total_k, Hkv, D], or [num_pages, page_size, Hkv, D] with `block_table`
    cu_seqlens_q, cu_seqlens_k : Tensor, [B + 1], int32 or int64
    max_seqlen_q, max_seqlen_k : int
        Bounds on the lengths.
    block_table : Tensor, [B, max_pages], int32 or int64, optional
    seqused_k : Tensor, [B], as cu_seqlens_k, optional
        Keys of each sequence that are used, in place of the differences of `cu_seqlens_k`.
    leftpad_k : Tensor, [B], likewise, optional
        Keys at the beginning of each that are none. Not with `block_table`.

    The others, and the result, are those of `flash_attn_func`.
    """
    longest_q, longest_k = int(max_seqlen_q), int(max_seqlen_k)
    rule = plain_mask(causal, window_size, keep_first)
    if rule is None:
        longest = (longest_q, longest_k)
        rule = mask_of(causal, window_size, keep_first, force_fa_decode, longest)
    kv_seqs: Ragged | Paged
    if seqused_k is None and leftpad_k is None:
        q_seqs, kv_seqs = sequences_of(
            cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, block_table
        )
    else:
        q_seqs = Ragged.from_cu_seqlens(cu_seqlens_q, longest_q)
        kv_seqs = keys_of(cu_seqlens_k, longest_k, block_table, seqused_k, leftpad_k)
    return _attend(
        q,
        k,
        v,
        rule,
        dropout_p,
        softmax_scale,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        q_seqs,
        kv_seqs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # noqa: ANN401
    """Compute `flash_attn_varlen_func` of kv [total_k, 2, Hkv, D], without a copy."""
    k, v = kv.unbind(-3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        keep_first,
        force_fa_decode,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # noqa: ANN401
    """Compute `flash_attn_varlen_func` of qkv [total, 3, H, D], without a copy."""
    q, k, v = qkv.unbind(-3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        keep_first,
        force_fa_decode,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Mask,
    dropout_p: float,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    q_seqs: Ragged | None = None,
    kv_seqs: Ragged | Paged | None = None,
) -> Any:  # noqa: ANN401
    """Call the core: out, or (out, lse, S_dmask)."""
    q, k, v = all_in_rows(q, k, v)
    state = None
    if return_attn_probs and dropout_p > 0.0:  # S_dmask is drawn from it again
        state = dropout_state(q.device)
    found = attention(
        q,
        k,
        v,
        mask=rule,
        scale=softmax_scale,
        return_lse=bool(return_attn_probs),
        q_seqs=q_seqs,
        kv_seqs=kv_seqs,
        alibi_slopes=alibi_slopes,
        softcap=softcap or None,
        dropout_p=dropout_p,
        dropout_state=state,
        deterministic=deterministic,
    )
    if not return_attn_probs:
        return found
    out, lse = found
    if state is None:
        return out, their_lse(lse), out.new_empty(0)
    dmask = dmask_of(
        q, k, rule, softmax_scale, softcap, alibi_slopes, dropout_p, state, q_seqs, kv_seqs
    )
    return out, their_lse(lse), dmask

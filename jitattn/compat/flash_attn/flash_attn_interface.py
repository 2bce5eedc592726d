"""FlashAttention's functions, translated to `jitattn.attention` and `attention_with_kvcache`.

All of them: fp16, bf16 or fp32; Hq a multiple of Hkv; `window_size` (left, right) in keys beside a
query's own, -1 for no bound, `causal` sets right to 0; both aligned to the bottom right. With
`return_attn_probs` the result is (out, lse, S_dmask): lse [B, Hq, Lq] or [Hq, total], +inf for rows
that see nothing, and S_dmask empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jitattn.attention import attention
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.kvcache import attention_with_kvcache
from jitattn.masks import Causal, Full, Window
from jitattn.rotary import Rotary
from jitattn.sequences import Paged, Ragged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.masks import Mask


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
    rule = _mask(causal, window_size, keep_first, force_fa_decode)
    given = _arguments(
        rule, dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _result(attention(q, k, v, **given), return_attn_probs)


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
    """Compute attention of sequences one after another; differentiable, but for pages.

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
    longest = int(max_seqlen_k)
    kv_seqs: Paged | Ragged = Ragged.from_cu_seqlens(cu_seqlens_k, longest)
    if block_table is not None or seqused_k is not None or leftpad_k is not None:
        start = cu_seqlens_k[:-1]
        lengths = cu_seqlens_k[1:] - start if seqused_k is None else seqused_k
        if leftpad_k is not None:
            start, lengths = start + leftpad_k, lengths - leftpad_k
        kv_seqs = Ragged(start, lengths, longest)
        if block_table is not None:
            if leftpad_k is not None:
                raise InvalidInputError("leftpad_k and block_table: pages begin with keys")
            kv_seqs = Paged(block_table, lengths, max_length=longest)
    rule = _mask(causal, window_size, keep_first, force_fa_decode)
    given = _arguments(
        rule, dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    q_seqs = Ragged.from_cu_seqlens(cu_seqlens_q, int(max_seqlen_q))
    out = attention(q, k, v, q_seqs=q_seqs, kv_seqs=kv_seqs, **given)
    return _result(out, return_attn_probs)


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
    if (rotary_cos is None) != (rotary_sin is None):
        raise InvalidInputError("rotary_cos and rotary_sin: give both, or neither")
    rotary = None
    if rotary_cos is not None and rotary_sin is not None:
        rotary = Rotary(rotary_cos, rotary_sin, interleaved=rotary_interleaved)
    length = cache_seqlens
    if length is None:
        if k is not None:
            raise InvalidInputError("k and v need cache_seqlens: where in the cache do they go?")
        length = k_cache.shape[1]
        if block_table is not None:
            length *= block_table.shape[1]
    result = attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        length=length,
        rotary=rotary,
        left_pad=cache_leftpad,
        batch_idx=cache_batch_idx,
        block_table=block_table,
        mask=_mask(causal, window_size, keep_first, force_fa_decode),
        scale=softmax_scale,
        num_splits=num_splits or None,
        return_lse=return_softmax_lse,
        alibi_slopes=alibi_slopes,
        softcap=softcap or None,
    )
    return (result[0], _their_lse(result[1])) if return_softmax_lse else result


def _mask(
    causal: bool, window_size: tuple[int, int], keep_first: int, force_fa_decode: bool
) -> Mask:
    """Return the rule; without a bound on the left, `keep_first` and the like mean nothing."""
    left, right = window_size
    if causal:
        right = 0
    if left < 0:
        if right < 0:
            return Full()
        return Causal() if right == 0 else Window(None, right)
    return Window(left, None if right < 0 else right, keep_first, bool(force_fa_decode))


def _arguments(
    mask: Mask,
    dropout_p: float,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> dict[str, Any]:
    if return_attn_probs and dropout_p > 0.0:
        raise UnsupportedError(
            f"return_attn_probs with dropout_p={dropout_p}: S_dmask is not computed; "
            "jitattn.attention takes a dropout_state, and jitattn.dropout_mask returns its mask"
        )
    return {
        "mask": mask,
        "scale": softmax_scale,
        "dropout_p": dropout_p,
        "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "return_lse": return_attn_probs,
    }


def _result(result: Any, return_attn_probs: bool) -> Any:  # noqa: ANN401
    if not return_attn_probs:
        return result
    out, lse = result
    return out, _their_lse(lse), out.new_empty(0)


def _their_lse(lse: Tensor) -> Tensor:
    """Rows that see nothing have +inf there."""
    return lse.masked_fill(lse == float("-inf"), float("inf"))

"""FlashAttention 3's functions, translated to `jitattn.attention`.

All of them: fp16, bf16 or fp32; Hq a multiple of Hkv; `window_size` (left, right) in keys beside a
query's own, -1 for no bound, `causal` sets right to 0; both aligned to the bottom right. With
`return_attn_probs` the result is (out, lse): lse [B, Hq, Lq] or [Hq, total], natural logarithms,
-inf for rows that see nothing. Paper: Shah et al., "FlashAttention-3", arXiv:2407.08608.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.compat._core import attention
from jitattn.compat._errors import ExtensionError, check, errors_as
from jitattn.compat._split_results import combined
from jitattn.compat.flash_attn._translate import WORDS, all_in_rows
from jitattn.compat.flash_attn_interface._translate import queries_and_keys, refuse, rule_of

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask
    from jitattn.values.sequences import Paged, Ragged

#: Head dims that the original has kernels for.
_HEAD_DIMS: Final = (64, 96, 128, 192, 256)


@errors_as(ExtensionError, WORDS)
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:  # noqa: ANN401 - Tensor, or two
    """Compute attention; differentiable.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D]
    k : Tensor, [B, Lkv, Hkv, D]
    v : Tensor, [B, Lkv, Hkv, Dv]
    softmax_scale : float, default 1 / sqrt(D)
    causal : bool
    qv, q_descale, k_descale, v_descale
        Refused.
    window_size : (int, int)
    attention_chunk : int, 0 for none
        Let a query see keys of its own chunk of positions alone.
    softcap : float, 0 for none
    num_splits, pack_gqa, sm_margin
        Steer the original's speed; no effect.
    deterministic : bool
        Of the backward pass.
    return_attn_probs : bool

    Returns
    -------
    Tensor, [B, Lq, Hq, Dv], or (out, lse) with `return_attn_probs`

    Raises
    ------
    ExtensionError
        An argument breaks a rule. A ValueError, and a RuntimeError as there.
    UnsupportedError
        No kernel exists.
    """
    del num_splits, pack_gqa, sm_margin
    if qv is not None or q_descale is not None or k_descale is not None or v_descale is not None:
        refuse(qv, q_descale, k_descale, v_descale)
    rule = rule_of(causal, window_size, attention_chunk)
    return _attend(q, k, v, rule, softmax_scale, softcap, deterministic, return_attn_probs)


@errors_as(ExtensionError, WORDS)
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:  # noqa: ANN401
    """Compute `flash_attn_func` of packed tensors, without a copy.

    Parameters
    ----------
    qkv : Tensor, [B, L, 3, H, D], or [B, L, Hq + 2 Hkv, D] with `num_heads_q`

    The others, and the result, are those of `flash_attn_func`.
    """
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(dim=-3)
    else:
        check(
            qkv.dim() == 4 and num_heads_q is not None,
            f"qkv has shape {list(qkv.shape)}: it must be [B, L, 3, H, D], or "
            "[B, L, Hq + 2 Hkv, D] with num_heads_q",
        )
        heads = num_heads_q or 0
        num_heads_k = (qkv.shape[2] - heads) // 2
        check(
            num_heads_k > 0 and heads + 2 * num_heads_k == qkv.shape[2],
            f"num_heads_q={num_heads_q}: qkv has {qkv.shape[2]} heads, and must have an even "
            "number more, for k and v",
        )
        q, k, v = qkv.split([heads, num_heads_k, num_heads_k], dim=-2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
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
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:  # noqa: ANN401
    """Compute attention of sequences one after another; differentiable.

    Parameters
    ----------
    q : Tensor, [total_q, Hq, D]
    k : Tensor, [total_k, Hkv, D]
    v : Tensor, [total_k, Hkv, Dv]
    cu_seqlens_q, cu_seqlens_k : Tensor, [B + 1], int32 or int64
    max_seqlen_q, max_seqlen_k : int
        Bounds on the lengths.
    seqused_q, seqused_k : Tensor, [B], as the cumulative lengths, optional
        Rows of each sequence that are used, from its first on. Others of `out` are 0.

    The others, and the result, are those of `flash_attn_func`.
    """
    del num_splits, pack_gqa, sm_margin
    if qv is not None or q_descale is not None or k_descale is not None or v_descale is not None:
        refuse(qv, q_descale, k_descale, v_descale)
    rule = rule_of(causal, window_size, attention_chunk)
    q_seqs, kv_seqs = queries_and_keys(
        cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), seqused_q, seqused_k
    )
    return _attend(
        q,
        k,
        v,
        rule,
        softmax_scale,
        softcap,
        deterministic,
        return_attn_probs,
        q_seqs,
        kv_seqs,
    )


@errors_as(ExtensionError)
def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge results over disjoint sets of keys, with `jitattn.merge`.

    Parameters
    ----------
    out_partial : Tensor, [S, B, L, H, Dv] or [S, total, H, Dv]
    lse_partial : Tensor, [S, B, L, H] or [S, total, H], fp32
    out : Tensor, [B, L, H, Dv] or [total, H, Dv], optional
    out_dtype : torch.dtype, default that of `out_partial`

    Returns
    -------
    out, and lse [B, L, H] or [total, H]
    """
    return combined(out_partial, lse_partial, out, out_dtype)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """Return an empty tensor, int32 [0]: `flash_attn_with_kvcache` plans without metadata."""
    del batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, qkv_dtype
    del headdim_v, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new
    del causal, window_size, attention_chunk, has_softcap, num_splits, pack_gqa, sm_margin
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)


def round_up_headdim(head_size: int) -> int:
    """Return the head dim of the original's kernel for a head dim; 256 at most."""
    return next((dim for dim in _HEAD_DIMS if head_size <= dim), _HEAD_DIMS[-1])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Mask,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    return_attn_probs: bool,
    q_seqs: Ragged | None = None,
    kv_seqs: Ragged | Paged | None = None,
) -> Any:  # noqa: ANN401
    """Call the core: out, or (out, lse)."""
    q, k, v = all_in_rows(q, k, v)
    return attention(
        q,
        k,
        v,
        mask=rule,
        scale=softmax_scale,
        return_lse=bool(return_attn_probs),
        q_seqs=q_seqs,
        kv_seqs=kv_seqs,
        softcap=softcap or None,
        deterministic=deterministic,
    )

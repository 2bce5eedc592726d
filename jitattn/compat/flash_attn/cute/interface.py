"""FlashAttention 4's functions, translated to `jitattn.attention`.

All of them: fp16, bf16 or fp32; Hq a multiple of Hkv; `window_size` (left, right) in keys beside a
query's own, None or negative for no bound, `causal` sets right to 0; both aligned to the bottom
right. The result is (out, lse), lse None without `return_lse`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from jitattn.compat._core import attention
from jitattn.compat._errors import CheckFailedError, errors_as
from jitattn.compat._split_results import combined
from jitattn.compat.flash_attn._translate import WORDS, all_in_rows
from jitattn.compat.flash_attn.cute._translate import both_of, check_plain, refuse, rule_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.values.sequences import KvSequences, QSequences

_WORDS = {**WORDS, "block_table": "page_table", "sinks": "learnable_sink"}
_Results = tuple["Tensor", "Tensor | None"]


class SchedulerMetadataTensorsTorch(NamedTuple):
    """What `get_scheduler_metadata` returns: nothing that a call here needs."""

    num_splits_dynamic_ptr: Tensor | None = None
    num_nheads_in_l2_ptr: Tensor | None = None
    tile_count_semaphore: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_total_splits_m_blocks: Tensor | None = None


@errors_as(CheckFailedError, _WORDS)
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[[Any, Any, Any, Any], Any] | None = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    block_sparse_tensors: Any | None = None,  # noqa: ANN401
    block_sparse_tensors_bwd: Any | None = None,  # noqa: ANN401
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> _Results:
    """Compute attention; differentiable.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D]
    k : Tensor, [B, Lkv, Hkv, D]
    v : Tensor, [B, Lkv, Hkv, Dv]
    softmax_scale : float, default 1 / sqrt(D)
    causal : bool
    window_size : (int or None, int or None)
    learnable_sink : Tensor, [Hq], optional
        A logit per head that takes part in the softmax, and in the LSE.
    softcap : float, 0 for none
    score_mod : callable, optional
        ``f(score, b, h, q_idx, kv_idx)``, plain Python; see `jitattn.attention`.
    mask_mod : callable, optional
        ``f(b, h, q_idx, kv_idx)``, plain Python; `causal` and `window_size` then have no effect, as
        in the original.
    deterministic : bool
        Of the backward pass.
    return_lse : bool
    num_splits, pack_gqa, gather_bwd_recompute_p, gather_bwd_token_chunk
        Steer the original's speed and memory; no effect.
    qv, gather_kv_indices, score_mod_bwd, aux_tensors, aux_scalars, block_sparse_tensors, \
block_sparse_tensors_bwd
        Refused.

    Returns
    -------
    out : Tensor, [B, Lq, Hq, Dv]
    lse : Tensor, [B, Hq, Lq], fp32, or None
        Natural logarithms; of rows that see nothing -inf, or the sink.

    Raises
    ------
    CheckFailedError
        An argument breaks a rule. A ValueError, and an AssertionError as there.
    UnsupportedError
        No kernel exists.
    """
    del num_splits, pack_gqa, gather_bwd_recompute_p, gather_bwd_token_chunk
    if not (
        qv is gather_kv_indices is None
        and score_mod_bwd is None
        and block_sparse_tensors is block_sparse_tensors_bwd is None
        and not aux_tensors
        and not aux_scalars
    ):
        _refuse(
            qv,
            gather_kv_indices,
            score_mod_bwd,
            aux_tensors,
            aux_scalars,
            block_sparse_tensors,
            block_sparse_tensors_bwd,
        )
    mask = rule_of(causal, window_size, mask_mod)
    return _attend(
        q, k, v, mask, softmax_scale, learnable_sink, softcap, deterministic, score_mod, return_lse
    )


@errors_as(CheckFailedError, _WORDS)
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[[Any, Any, Any, Any], Any] | None = None,
    block_sparse_tensors: Any | None = None,  # noqa: ANN401
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    return_lse: bool = False,
    scheduler_metadata: SchedulerMetadataTensorsTorch | None = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> _Results:
    """Compute attention of sequences; differentiable, through pages too.

    Parameters
    ----------
    q : Tensor, [total_q, Hq, D] with `cu_seqlens_q`, else [B, Lq, Hq, D]
    k, v : Tensor, [total_k, Hkv, D] with `cu_seqlens_k`, [num_pages, page_size, Hkv, D] with \
`page_table`, else [B, Lkv, Hkv, D]
    cu_seqlens_q, cu_seqlens_k : Tensor, [B + 1], int32 or int64, optional
    max_seqlen_q, max_seqlen_k : int, optional
        Bounds on the lengths. Without one, as many rows as the tensor has are planned for: slower.
    seqused_q, seqused_k : Tensor, [B], optional
        Rows of each sequence that are used, from its first on.
    page_table : Tensor, [B, max_pages], optional
    min_seqlen_k, scheduler_metadata, seqlen_k_per_split, disable_scheduler_metadata
        Steer the original's speed; no effect.

    The others are those of `flash_attn_func`.

    Returns
    -------
    out : Tensor, as q with Dv columns
        0 in rows that belong to no sequence.
    lse : Tensor, [Hq, total_q] or [B, Hq, Lq], fp32, or None
    """
    del num_splits, pack_gqa, gather_bwd_recompute_p, gather_bwd_token_chunk, min_seqlen_k
    del scheduler_metadata, seqlen_k_per_split, disable_scheduler_metadata
    if not (
        qv is gather_kv_indices is None
        and score_mod_bwd is None
        and block_sparse_tensors is None
        and not aux_tensors
        and not aux_scalars
    ):
        _refuse(
            qv,
            gather_kv_indices,
            score_mod_bwd,
            aux_tensors,
            aux_scalars,
            block_sparse_tensors,
            None,
        )
    mask = rule_of(causal, window_size, mask_mod)
    q_seqs, kv_seqs = both_of(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        page_table,
    )
    return _attend(
        q,
        k,
        v,
        mask,
        softmax_scale,
        learnable_sink,
        softcap,
        deterministic,
        score_mod,
        return_lse,
        q_seqs,
        kv_seqs,
    )


@errors_as(CheckFailedError)
def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    virtual_batch_idx: Tensor | None = None,
    return_lse: bool = True,
) -> _Results:
    """Merge results over disjoint sets of keys, with `jitattn.merge`.

    Parameters
    ----------
    out_partial : Tensor, [S, B, L, H, Dv] or [S, total, H, Dv]
    lse_partial : Tensor, [S, B, L, H] or [S, total, H], fp32
    out : Tensor, [B, L, H, Dv] or [total, H, Dv], optional
    out_dtype : torch.dtype, default that of `out_partial`
    cu_seqlens, seqused, virtual_batch_idx
        All rows are merged, whatever sequence they belong to; no effect.
    return_lse : bool

    Returns
    -------
    out, and lse [B, L, H] or [total, H], or None
    """
    del cu_seqlens, seqused, virtual_batch_idx
    merged, lse = combined(out_partial, lse_partial, out, out_dtype)
    return merged, lse if return_lse else None


def get_scheduler_metadata(
    max_seqlen_q: int,
    max_seqlen_k: int,
    nheads: int,
    nheads_kv: int,
    headdim: int,
    num_splits: int,
    headdim_v: int | None = None,
    pack_gqa: int | None = None,
    causal: bool = False,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqlen_k_new: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqlen_k_per_split: int | None = None,
    _arch: int | None = None,
) -> SchedulerMetadataTensorsTorch:
    """Return a tuple of None: `flash_attn_varlen_func` plans without metadata."""
    del max_seqlen_q, max_seqlen_k, nheads, nheads_kv, headdim, num_splits, headdim_v, pack_gqa
    del causal, window_size_left, window_size_right, seqlen_k_new, cu_seqlens_q, cu_seqlens_k
    del cu_seqlens_k_new, seqused_q, seqused_k, leftpad_k, seqlen_k_per_split, _arch
    return SchedulerMetadataTensorsTorch()


def _refuse(
    qv: object,
    gather_kv_indices: object,
    score_mod_bwd: object,
    aux_tensors: object,
    aux_scalars: object,
    block_sparse_tensors: object,
    block_sparse_tensors_bwd: object,
) -> None:
    refuse(
        {
            "qv": qv,
            "gather_kv_indices": gather_kv_indices,
            "block_sparse_tensors": block_sparse_tensors,
            "block_sparse_tensors_bwd": block_sparse_tensors_bwd,
            "score_mod_bwd": score_mod_bwd,
            "aux_tensors": aux_tensors or None,
            "aux_scalars": aux_scalars or None,
        }
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,  # noqa: ANN401 - a mask
    softmax_scale: float | None,
    learnable_sink: Tensor | None,
    softcap: float,
    deterministic: bool,
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None,
    return_lse: bool,
    q_seqs: QSequences = None,
    kv_seqs: KvSequences = None,
) -> _Results:
    """Call the core: (out, lse), lse None unless asked for."""
    if score_mod is not None:
        check_plain("score_mod", score_mod)
    q, k, v = all_in_rows(q, k, v)
    found = attention(
        q,
        k,
        v,
        mask=mask,
        scale=softmax_scale,
        return_lse=bool(return_lse),
        q_seqs=q_seqs,
        kv_seqs=kv_seqs,
        sinks=learnable_sink,
        softcap=softcap or None,
        score_mod=score_mod,
        deterministic=deterministic,
    )
    if not return_lse:
        return found, None
    out, lse = found
    if learnable_sink is not None:  # the core leaves it out, the original takes it in
        sink = learnable_sink.to(lse.dtype)
        lse = torch.logaddexp(lse, sink[:, None])
    return out, lse


__all__ = [
    "SchedulerMetadataTensorsTorch",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
]

"""FlashAttention 3's function classes, and the operators under its functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.compat._errors import ExtensionError, errors_as
from jitattn.compat._gradients import gradients_of
from jitattn.compat.flash_attn._translate import WORDS, in_rows
from jitattn.compat.flash_attn_interface._functions import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from jitattn.compat.flash_attn_interface._kvcache import flash_attn_with_kvcache
from jitattn.compat.flash_attn_interface._translate import queries_and_keys, rule_of
from jitattn.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


class FlashAttnFunc:
    """The function class of `flash_attn_func`; `apply` takes its arguments."""

    apply = staticmethod(flash_attn_func)


class FlashAttnQKVPackedFunc:
    """The function class of `flash_attn_qkvpacked_func`; `apply` takes its arguments."""

    apply = staticmethod(flash_attn_qkvpacked_func)


class FlashAttnVarlenFunc:
    """The function class of `flash_attn_varlen_func`."""

    @staticmethod
    def apply(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *more: Any,  # noqa: ANN401 - as flash_attn_varlen_func takes them
    ) -> Any:  # noqa: ANN401 - the function's
        """Call the function; used rows precede the bounds here."""
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            seqused_q,
            seqused_k,
            *more,
        )


@torch.no_grad()
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute attention without autograd: batched, one after another, or over a cache.

    Returns
    -------
    out, lse, and two empty tensors: there are no results of splits to give back.
    """
    del scheduler_metadata, num_splits, pack_gqa, sm_margin
    own: dict[str, Any] = {
        "qv": qv,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": (window_size_left, window_size_right),
        "attention_chunk": attention_chunk,
        "softcap": softcap,
    }
    if cu_seqlens_k is not None and cu_seqlens_q is not None:
        if page_table is not None or leftpad_k is not None or k_new is not None:
            raise UnsupportedError(
                "cu_seqlens_k with page_table, leftpad_k or k_new: keys lie one after another, or "
                "in a cache; leave cu_seqlens_k out, and give seqused_k"
            )
        out, lse = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0, seqused_q,
            seqused_k, return_attn_probs=True, **own,
        )  # fmt: skip
    elif (seqused_k, page_table, kv_batch_idx, leftpad_k, k_new, cu_seqlens_q) == (None,) * 6:
        if seqused_q is not None:
            raise UnsupportedError("seqused_q without cu_seqlens_q: give both")
        out, lse = flash_attn_func(q, k, v, return_attn_probs=True, **own)
    else:
        out, lse = flash_attn_with_kvcache(
            q, k, v, k_new, v_new, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
            cache_seqlens=seqused_k, cache_batch_idx=kv_batch_idx, cache_leftpad=leftpad_k,
            page_table=page_table, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new,
            max_seqlen_q=max_seqlen_q, rotary_seqlens=seqlens_rotary,
            rotary_interleaved=rotary_interleaved, return_softmax_lse=True, **own,
        )  # fmt: skip
    if out_ is not None:
        out = out_.copy_(out)
    return out, lse, lse.new_empty(0), lse.new_empty(0)


@errors_as(ExtensionError, WORDS)
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Write dq, dk and dv where they are given, and return the row sums of dout * out.

    Returns
    -------
    softmax_d : Tensor, [B, Hq, Lq] or [Hq, total], fp32
        Without the original's padding, which depends on its tiles.
    """
    del sm_margin
    rule = rule_of(is_causal, (window_size_left, window_size_right), 0)
    given: dict[str, Any] = {
        "mask": rule,
        "scale": softmax_scale,
        "softcap": softcap or None,
        "deterministic": deterministic,
    }
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        given["q_seqs"], given["kv_seqs"] = queries_and_keys(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0, sequed_q, sequed_k
        )
    q, k, v = in_rows(q), in_rows(k), in_rows(v)
    results = gradients_of(dout, q, k, v, out, softmax_lse, given)
    for room, result in zip((dq, dk, dv), results, strict=True):
        if room is not None:
            room.copy_(result)
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()

"""The extension module under FlashAttention's functions, with SWAA's arguments; no autograd.

Names, order and results are those of the original: tensors in, a list of tensors out. `keep_first`
and `force_fa_decode` follow `softcap` everywhere, `bwd` and `varlen_bwd` included, where they hold
as well (the original ignores the latter there). LSEs are [B, Hq, Lq] or [Hq, total], +inf for rows
that see nothing; `rng_state` is a dropout's, int64 [2], 0 without one. Windows, dtypes and head
dims as in `jitattn.compat.flash_attn`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import jitattn.run.operators  # noqa: F401 - registers the operators
from jitattn.api.attention import bind
from jitattn.compat._core import attention
from jitattn.compat._errors import ExtensionError, errors_as
from jitattn.compat.flash_attn._kvcache import with_kvcache
from jitattn.compat.flash_attn._translate import (
    CACHE_WORDS,
    WORDS,
    dmask_of,
    in_rows,
    keys_of,
    lengths_of,
    mask_of,
    our_lse,
    rounded_up,
    their_lse,
)
from jitattn.errors import InvalidInputError
from jitattn.run.operator_encoding import encode
from jitattn.values.dropout import dropout_state
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from torch import Tensor


@errors_as(ExtensionError, WORDS)
def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    keep_first: int,
    force_fa_decode: bool,
    return_softmax: bool,
    gen: torch.Generator | None,
) -> list[Tensor]:
    """Compute attention of q [B, Lq, Hq, D] and k, v [B, Lkv, Hkv, D].

    Returns
    -------
    [out, lse, S_dmask, rng_state]
        S_dmask is empty unless `return_softmax`, which needs a dropout.
    """
    window = (window_size_left, window_size_right)
    mask = mask_of(is_causal, window, keep_first, force_fa_decode, lengths_of(q, k))
    given = _given(mask, softmax_scale, softcap, alibi_slopes)
    return _forward(q, k, v, out, given, p_dropout, return_softmax, gen)


@errors_as(ExtensionError, WORDS)
def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    keep_first: int,
    force_fa_decode: bool,
    return_softmax: bool,
    gen: torch.Generator | None,
) -> list[Tensor]:
    """Compute attention of sequences one after another, or with keys in pages of any size.

    With `seqused_k`, `cu_seqlens_k` counts for nothing but where sequences start, and for nothing
    at all with `block_table`. No page number is special. `zero_tensors` clears what of `out`
    belongs to no sequence.

    Returns
    -------
    [out, lse, S_dmask, rng_state]
    """
    window = (window_size_left, window_size_right)
    longest = (int(max_seqlen_q), int(max_seqlen_k))
    mask = mask_of(is_causal, window, keep_first, force_fa_decode, longest)
    given = _given(mask, softmax_scale, softcap, alibi_slopes)
    if zero_tensors and out is not None:
        out.zero_()
    given["q_seqs"] = Ragged.from_cu_seqlens(cu_seqlens_q, int(max_seqlen_q))
    given["kv_seqs"] = keys_of(cu_seqlens_k, max_seqlen_k, block_table, seqused_k, leftpad_k)
    return _forward(q, k, v, out, given, p_dropout, return_softmax, gen)


@errors_as(ExtensionError, WORDS)
def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    keep_first: int,
    force_fa_decode: bool,
    deterministic: bool,
    gen: torch.Generator | None,
    rng_state: Tensor | None,
) -> list[Tensor]:
    """Compute the gradients of `fwd`, into dq, dk and dv where they are given.

    Returns
    -------
    [dq, dk, dv, softmax_d]
        softmax_d is rowsum(dout * out), fp32 [B, Hq, Lq rounded up to 128].
    """
    del gen
    window = (window_size_left, window_size_right)
    mask = mask_of(is_causal, window, keep_first, force_fa_decode, lengths_of(q, k))
    given = _given(mask, softmax_scale, softcap, alibi_slopes)
    given["deterministic"] = deterministic
    results = _backward(dout, q, k, v, out, softmax_lse, given, p_dropout, rng_state)
    room = rounded_up(q.shape[1]) - q.shape[1]
    softmax_d = torch.nn.functional.pad(_row_sums(dout, out).transpose(1, 2), (0, room))
    return [*_into((dq, dk, dv), results), softmax_d.contiguous()]


@errors_as(ExtensionError, WORDS)
def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    keep_first: int,
    force_fa_decode: bool,
    deterministic: bool,
    gen: torch.Generator | None,
    rng_state: Tensor | None,
) -> list[Tensor]:
    """Compute the gradients of `varlen_fwd`; rows that belong to no sequence get 0.

    Returns
    -------
    [dq, dk, dv, softmax_d]
        softmax_d is fp32 [Hq, total + 128 B]; row i of sequence b is column cu[b] + 128 b + i.
    """
    del gen, zero_tensors
    window = (window_size_left, window_size_right)
    longest = (int(max_seqlen_q), int(max_seqlen_k))
    mask = mask_of(is_causal, window, keep_first, force_fa_decode, longest)
    given = _given(mask, softmax_scale, softcap, alibi_slopes)
    given["deterministic"] = deterministic
    given["q_seqs"] = Ragged.from_cu_seqlens(cu_seqlens_q, int(max_seqlen_q))
    given["kv_seqs"] = keys_of(cu_seqlens_k, max_seqlen_k)
    results = _backward(dout, q, k, v, out, softmax_lse, given, p_dropout, rng_state)
    row = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), row, right=True)
    num_seqs = cu_seqlens_q.shape[0] - 1
    sums = _row_sums(dout, out).transpose(0, 1)
    softmax_d = sums.new_zeros(q.shape[1], q.shape[0] + 128 * num_seqs)
    softmax_d[:, row + 128 * sequence.clamp(max=max(0, num_seqs - 1))] = sums
    return [*_into((dq, dk, dv), results), softmax_d]


@errors_as(ExtensionError, CACHE_WORDS)
def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens_k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    keep_first: int,
    force_fa_decode: bool,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """Append k and v to a cache in place and attend to it, as `flash_attn_with_kvcache` does.

    The result has no gradient, as there.

    Returns
    -------
    [out, lse]
    """
    if seqlens_k is not None and not isinstance(seqlens_k, torch.Tensor):
        raise InvalidInputError(f"cache_seqlens={seqlens_k!r}: it must be a tensor [B]")
    out, lse = with_kvcache(
        q,
        kcache,
        vcache,
        k,
        v,
        seqlens_k,
        rotary_cos,
        rotary_sin,
        cache_batch_idx,
        leftpad_k,
        block_table,
        alibi_slopes,
        out,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        keep_first,
        force_fa_decode,
        is_rotary_interleaved,
        num_splits,
        return_lse=True,
    )
    return [out, lse]


def _given(
    mask: Any,  # noqa: ANN401 - a mask
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    return {
        "mask": mask,
        "scale": softmax_scale,
        "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
    }


@torch.no_grad()
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    given: dict[str, Any],
    p_dropout: float,
    return_softmax: bool,
    gen: torch.Generator | None,
) -> list[Tensor]:
    if return_softmax and p_dropout <= 0.0:
        raise InvalidInputError("return_softmax is for calls with dropout: p_dropout is 0")
    state = None
    if p_dropout > 0.0:
        state = dropout_state(q.device, generator=gen)
        given |= {"dropout_p": p_dropout, "dropout_state": state}
    q, k, v = in_rows(q), in_rows(k), in_rows(v)
    result, lse = attention(q, k, v, **given, out=out, return_lse=True)
    dmask = q.new_empty(0)
    if return_softmax and state is not None:
        dmask = dmask_of(
            q,
            k,
            given["mask"],
            given["scale"],
            given["softcap"],
            given["alibi_slopes"],
            p_dropout,
            state,
            given.get("q_seqs"),
            given.get("kv_seqs"),
        )
    rng_state = torch.zeros(2, dtype=torch.int64, device=q.device) if state is None else state
    if out is None:
        result = result.contiguous()
    return [result, their_lse(lse).contiguous(), dmask, rng_state]


@torch.no_grad()
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    given: dict[str, Any],
    p_dropout: float,
    rng_state: Tensor | None,
) -> list[Tensor]:
    if p_dropout > 0.0:
        if rng_state is None:
            raise InvalidInputError(
                f"p_dropout={p_dropout} without rng_state: give the one that fwd returned, so that "
                "the same weights are dropped"
            )
        given |= {"dropout_p": p_dropout, "dropout_state": rng_state}
    tensors, call = bind(q, k, v, given)
    q, k, v = (tensors[name] for name in "qkv")
    found: list[Tensor] = torch.ops.jitattn.attention_backward(
        dout, torch.zeros_like(softmax_lse), q, k, v, out, our_lse(softmax_lse), *encode(call), []
    )
    return found


def _into(given: tuple[Tensor | None, ...], results: list[Tensor]) -> list[Tensor]:
    """Copy results into the caller's tensors where they are given."""
    pairs = zip(given, results, strict=True)
    return [result if room is None else room.copy_(result) for room, result in pairs]


def _row_sums(dout: Tensor, out: Tensor) -> Tensor:
    return (dout.float() * out.float()).sum(-1)

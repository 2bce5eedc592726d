"""aten's flash attention operators, computed by jitattn.

Each function has the name, arguments and results of an operator. In those of SDPA tensors are
[B, H, L, D]; in the others, [B, L, H, D], or [total, H, D] with cumulative lengths. Results have
the strides that torch's fake kernels say.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.errors import UnsupportedError
from jitattn.integrations._sdpa_common import (
    backward,
    forward,
    laid_out,
    plain_forward,
    refuse_if,
)
from jitattn.values.masks import Causal, Full, Window
from jitattn.values.sequences import Padded, Paged, Ragged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask

_FULL, _CAUSAL = Full(), Causal()


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    refuse_if(return_debug_mask, "return_debug_mask")
    refuse_if(is_causal and query.shape[2] != key.shape[2], "is_causal with other lengths of k")
    mask = _CAUSAL if is_causal else _FULL
    q, k, v, layout = query, key, value, "bhsd"
    is_turned = not query.is_contiguous()
    if is_turned:
        q, k, v, layout = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), "bshd"
    if dropout_p == 0.0:
        (out, lse), state = plain_forward(q, k, v, mask, scale, layout), None
    else:
        out, lse, state = forward(q, k, v, mask, scale, dropout_p, layout=layout)
    if is_turned:
        out = laid_out(out.transpose(1, 2), query)
    lengths = (query.shape[2], key.shape[2])
    return out, lse, None, None, *lengths, *_random(state, query), _nothing(query)


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    del cum_seq_q, cum_seq_k, max_q, max_k, philox_offset
    tensors = (grad_out, query, key, value, out)
    mask = _CAUSAL if is_causal else _FULL
    random = philox_seed.view(torch.int64) if dropout_p > 0.0 else philox_seed
    if query.is_contiguous() and key.is_contiguous() and value.is_contiguous():
        found = backward(tensors, logsumexp, mask, scale, dropout_p, random, layout="bhsd")
        return tuple(found)
    turned = [x.transpose(1, 2) for x in tensors]
    dq, dk, dv = backward(turned, logsumexp, mask, scale, dropout_p, random)
    pairs = ((dq, query), (dk, key), (dv, value))
    return tuple(laid_out(dx.transpose(1, 2), x) for dx, x in pairs)


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> tuple[Any, ...]:
    del num_splits  # steers speed alone
    refuse_if(return_debug_mask, "return_debug_mask")
    given: dict[str, Any] = {"alibi_slopes": alibi_slopes}
    if cum_seq_q is not None:
        given["q_seqs"] = Ragged.from_cu_seqlens(cum_seq_q, max_q)
    if block_table is not None:
        if seqused_k is None:
            raise UnsupportedError("block_table without seqused_k: ours does not take it")
        given["kv_seqs"] = Paged(block_table, seqused_k, max_length=max_k)
    elif cum_seq_k is not None:
        given["kv_seqs"] = Ragged.from_cu_seqlens(cum_seq_k, max_k)
        if seqused_k is not None:
            given["kv_seqs"] = Ragged(cum_seq_k[:-1], seqused_k.to(cum_seq_k.dtype), max_k)
    elif seqused_k is not None:
        given["kv_seqs"] = Padded(seqused_k)
    mask = _windowed(is_causal, window_size_left, window_size_right)
    if out is not None:
        given["out"] = out
    found, lse, state = forward(query, key, value, mask, scale, dropout_p, **given)
    return laid_out(found, query), lse, *_random(state, query), _nothing(query)


def _flash_attention_forward_no_dropout_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **more: Any,  # noqa: ANN401 - those of `_flash_attention_forward`
) -> Tensor:
    refuse_if(dropout_p != 0.0, "dropout_p")
    lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
    found = _flash_attention_forward(
        query, key, value, *lengths, 0.0, is_causal, return_debug_mask, out=out, **more
    )
    lse: Tensor = found[1]
    return lse


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    del unused
    given: dict[str, Any] = {}
    if cum_seq_q is not None and cum_seq_k is not None:
        given["q_seqs"] = Ragged.from_cu_seqlens(cum_seq_q, max_q)
        given["kv_seqs"] = Ragged.from_cu_seqlens(cum_seq_k, max_k)
    mask = _windowed(is_causal, window_size_left, window_size_right)
    tensors = (grad_out, query, key, value, out)
    found = backward(
        tensors, logsumexp, mask, scale, dropout_p, rng_state.view(torch.int64), **given
    )
    return tuple(laid_out(dx, x) for dx, x in zip(found, (query, key, value), strict=True))


def _windowed(is_causal: bool, left: int | None, right: int | None) -> Mask:
    """Return the mask of window sizes, where None and negative numbers are infinite."""
    left = None if left is None or left < 0 else left
    right = None if right is None or right < 0 else right
    if is_causal:
        return Causal() if left is None else Window(left, 0)
    return Full() if left is None and right is None else Window(left, right)


def _random(state: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a dropout state as flash kernels return theirs."""
    if state is None:
        return _no_random(like.device)
    return state.view(torch.uint64), _no_random(like.device)[1]


@functools.cache
def _no_random(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a dropout state that nothing reads, the same for every call."""
    state = torch.zeros(2, dtype=torch.uint64, device=device)
    return state, torch.zeros((), dtype=torch.uint64, device=device)


def _nothing(like: Tensor) -> Tensor:
    """Return the weights that a call without `return_debug_mask` returns: none."""
    return _no_weights(like.dtype, like.device)


@functools.cache
def _no_weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


#: The operators of this file.
OPERATORS: Final = (
    _scaled_dot_product_flash_attention,
    _scaled_dot_product_flash_attention_backward,
    _flash_attention_forward,
    _flash_attention_forward_no_dropout_inplace,
    _flash_attention_backward,
)

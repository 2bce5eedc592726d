"""aten's memory-efficient attention operators, computed by jitattn.

Each function has the name, arguments and results of an operator. In those of SDPA tensors are
[B, H, L, D]; in the others, [B, L, H, D]. Results have the strides that torch's fake kernels say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.integrations._sdpa_common import backward, forward, in_rows, laid_out, refuse_if
from jitattn.values.masks import Causal, Full

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask

#: Rows to which the memory-efficient kernel rounds its LSE up, and columns, the bias's gradient.
_LSE_UNIT: Final = 32
_BIAS_UNIT: Final = 16
#: Seed and offset of a call without dropout.
_NO_SEED: Final = tuple(torch.zeros((), dtype=torch.int64, device="cpu") for _ in range(2))
#: `custom_mask_type` of the memory-efficient kernel.
_MASKS: Final[dict[int, Mask]] = {0: Full(), 1: Causal("top_left"), 2: Causal()}


def _scaled_dot_product_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask: Mask = Causal("top_left") if is_causal else Full()
    found = forward(q, k, v, mask, scale, dropout_p, bias=_without_copies(attn_bias))
    out, lse, state = found
    return out.transpose(1, 2), _rounded_up(lse, compute_log_sumexp), *_seed(state)


def _scaled_dot_product_efficient_attention_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    tensors = [x.transpose(1, 2) for x in (grad_out_, query, key, value, out)]
    mask: Mask = Causal("top_left") if is_causal else Full()
    wants_bias = attn_bias is not None and grad_input_mask[3]
    dq, dk, dv, *more = backward(
        tensors,
        logsumexp[..., : query.shape[2]],
        mask,
        scale,
        dropout_p,
        _state(philox_seed, philox_offset, dropout_p),
        bias=_whole(attn_bias) if wants_bias else _without_copies(attn_bias),
        wants_bias=wants_bias,
    )
    d_bias = _in_aligned_rows(more[0]) if more else None
    return *(dx.transpose(1, 2) for dx in (dq, dk, dv)), d_bias


def _efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    seqlen_k: Tensor | None = None,
    window_size: int | None = None,
) -> tuple[Any, ...]:
    refuse_if(cu_seqlens_q is not None or cu_seqlens_k is not None, "cu_seqlens")
    refuse_if(seqlen_k is not None, "seqlen_k")
    refuse_if(window_size is not None, "window_size")
    mask = _MASKS[custom_mask_type]
    found = forward(query, key, value, mask, scale, dropout_p, bias=_without_copies(bias))
    out, lse, state = found
    lengths = (
        query.shape[1] if max_seqlen_q is None else max_seqlen_q,
        key.shape[1] if max_seqlen_k is None else max_seqlen_k,
    )
    return out, _rounded_up(lse, compute_log_sumexp), *_seed(state), *lengths


def _efficient_attention_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Tensor,
    dropout_p: float,
    philox_seed: Tensor,
    philox_offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float | None = None,
    num_splits_key: int | None = None,
    window_size: int | None = None,
    shared_storage_dqdkdv: bool = False,
) -> tuple[Any, ...]:
    del max_seqlen_q, max_seqlen_k, num_splits_key
    refuse_if(cu_seqlens_q is not None or cu_seqlens_k is not None, "cu_seqlens")
    refuse_if(window_size is not None, "window_size")
    refuse_if(shared_storage_dqdkdv, "shared_storage_dqdkdv")
    wants_bias = bias is not None and bias_requires_grad
    dq, dk, dv, *more = backward(
        (grad_out_, query, key, value, out),
        logsumexp[..., : query.shape[1]],
        _MASKS[custom_mask_type],
        scale,
        dropout_p,
        _state(philox_seed, philox_offset, dropout_p),
        bias=_whole(bias) if wants_bias else _without_copies(bias),
        wants_bias=wants_bias,
    )
    given = zip((dq, dk, dv), (query, key, value), strict=True)
    d_bias = _in_aligned_rows(more[0]) if more else query.new_empty(())
    return *(laid_out(dx, x) for dx, x in given), d_bias


def _without_copies(bias: Tensor | None) -> Tensor | None:
    """Return a bias whose broadcast dimensions but the last have size 1."""
    if bias is None:
        return None
    for dim in range(bias.dim() - 1):
        if bias.stride(dim) == 0 and bias.shape[dim] > 1:
            bias = bias.narrow(dim, 0, 1)
    return in_rows(bias)


def _whole(bias: Tensor | None) -> Tensor | None:
    """Return a bias whose gradient is wanted for every element."""
    return None if bias is None else in_rows(bias)


def _in_aligned_rows(d_bias: Tensor) -> Tensor:
    """Return the gradient of a bias with rows as far apart as those of torch's kernel."""
    length = d_bias.shape[-1]
    if length % _BIAS_UNIT == 0:
        return d_bias
    room = d_bias.new_empty((*d_bias.shape[:-1], length + -length % _BIAS_UNIT))
    return room[..., :length].copy_(d_bias)


def _rounded_up(lse: Tensor, is_wanted: bool) -> Tensor:
    """Return the LSE with as many rows as the memory-efficient kernel's has."""
    if not is_wanted:
        return lse[..., :0]
    missing = -lse.shape[-1] % _LSE_UNIT
    return torch.nn.functional.pad(lse, (0, missing)) if missing else lse


def _seed(state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a dropout state as the memory-efficient kernel returns its own."""
    if state is None:
        return _NO_SEED[0], _NO_SEED[1]
    return state[0].clone(), state[1].clone()  # graphs ask for aligned memory


def _state(seed: Tensor, offset: Tensor, dropout_p: float) -> Tensor:
    """Return the dropout state of the memory-efficient kernel's seed and offset."""
    return torch.stack([seed, offset]) if dropout_p > 0.0 else seed


#: The operators of this file.
OPERATORS: Final = (
    _scaled_dot_product_efficient_attention,
    _scaled_dot_product_efficient_attention_backward,
    _efficient_attention_forward,
    _efficient_attention_backward,
)

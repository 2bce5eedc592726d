"""aten's flash and memory-efficient attention operators, computed by jitattn.

Each function has the name, arguments and results of an operator. In the dense ones, flash of SDPA
and memory-efficient of SDPA, tensors are [B, H, L, D]; in the others, [B, L, H, D], or
[total, H, D] with cumulative lengths. Results have the strides that torch's fake kernels say.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.api.attention import attention
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.request.problem import Call
from jitattn.request.scores import NO_CHANGES, Scores, in_fp32
from jitattn.run.backward import run_backward
from jitattn.run.operator_encoding import encode
from jitattn.values.autocast import outside_autocast
from jitattn.values.dropout import Dropout, dropout_state, threshold_of
from jitattn.values.masks import Causal, Full, Window
from jitattn.values.sequences import Padded, Paged, Ragged
from jitattn.values.tensors import MAX_HEAD_DIM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from jitattn.values.masks import Mask

_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
_FULL, _CAUSAL = Full(), Causal()
_attend: Final = outside_autocast(attention)
#: Rows to which the memory-efficient kernel rounds its LSE up, and columns, the bias's gradient.
_LSE_UNIT: Final = 32
_BIAS_UNIT: Final = 16
#: Seed and offset of a call without dropout.
_NO_SEED: Final = tuple(torch.zeros((), dtype=torch.int64, device="cpu") for _ in range(2))
#: `custom_mask_type` of the memory-efficient kernel.
_MASKS: Final[dict[int, Mask]] = {0: Full(), 1: Causal("top_left"), 2: Causal()}


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
    _refuse_if(return_debug_mask, "return_debug_mask")
    _refuse_if(is_causal and query.shape[2] != key.shape[2], "is_causal with other lengths of k")
    mask = _CAUSAL if is_causal else _FULL
    if query.is_contiguous():
        out, lse, state = _forward(query, key, value, mask, scale, dropout_p, layout="bhsd")
    else:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out, lse, state = _forward(q, k, v, mask, scale, dropout_p)
        out = _laid_out(out.transpose(1, 2), query)
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
        found = _backward(tensors, logsumexp, mask, scale, dropout_p, random, layout="bhsd")
        return tuple(found)
    turned = [x.transpose(1, 2) for x in tensors]
    dq, dk, dv = _backward(turned, logsumexp, mask, scale, dropout_p, random)
    pairs = ((dq, query), (dk, key), (dv, value))
    return tuple(_laid_out(dx.transpose(1, 2), x) for dx, x in pairs)


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
    _refuse_if(return_debug_mask, "return_debug_mask")
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
    found, lse, state = _forward(query, key, value, mask, scale, dropout_p, **given)
    return _laid_out(found, query), lse, *_random(state, query), _nothing(query)


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
    _refuse_if(dropout_p != 0.0, "dropout_p")
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
    found = _backward(
        tensors, logsumexp, mask, scale, dropout_p, rng_state.view(torch.int64), **given
    )
    return tuple(_laid_out(dx, x) for dx, x in zip(found, (query, key, value), strict=True))


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
    found = _forward(q, k, v, mask, scale, dropout_p, bias=_without_copies(attn_bias))
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
    dq, dk, dv, *more = _backward(
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
    _refuse_if(cu_seqlens_q is not None or cu_seqlens_k is not None, "cu_seqlens")
    _refuse_if(seqlen_k is not None, "seqlen_k")
    _refuse_if(window_size is not None, "window_size")
    mask = _MASKS[custom_mask_type]
    found = _forward(query, key, value, mask, scale, dropout_p, bias=_without_copies(bias))
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
    _refuse_if(cu_seqlens_q is not None or cu_seqlens_k is not None, "cu_seqlens")
    _refuse_if(window_size is not None, "window_size")
    _refuse_if(shared_storage_dqdkdv, "shared_storage_dqdkdv")
    wants_bias = bias is not None and bias_requires_grad
    dq, dk, dv, *more = _backward(
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
    return *(_laid_out(dx, x) for dx, x in given), d_bias


# ---- Common parts; tensors are [B, L, H, D] or [total, H, D]


def _refuse_if(refused: bool, what: str) -> None:
    if refused:
        raise UnsupportedError(f"{what}: ours does not take it")


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise UnsupportedError(f"{q.dtype}, {k.dtype} and {v.dtype}: ours takes one of {_DTYPES}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise UnsupportedError(f"head_dim={q.shape[-1]}: ours takes at most {MAX_HEAD_DIM}")


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None,
    dropout_p: float,
    **given: Any,  # noqa: ANN401 - of `attention`
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute out, the LSE and the state of the dropout, if there is any."""
    _check(q, k, v)
    state = None
    if dropout_p > 0.0:
        state = dropout_state(q.device)
        given |= {"dropout_p": dropout_p, "dropout_state": state}
    q, k, v = _in_rows(q), _in_rows(k), _in_rows(v)
    try:
        out, lse = _attend(q, k, v, mask=mask, scale=scale, return_lse=True, **given)
    except InvalidInputError as error:
        raise UnsupportedError(str(error)) from error
    return out, lse, state


def _backward(
    tensors: Sequence[Tensor],
    lse: Tensor,
    mask: Mask,
    scale: float | None,
    dropout_p: float,
    state: Tensor,
    *,
    bias: Tensor | None = None,
    wants_bias: bool = False,
    layout: str = "bshd",
    q_seqs: Ragged | None = None,
    kv_seqs: Ragged | None = None,
) -> list[Tensor]:
    """Compute dq, dk, dv, and the gradient of a bias if it is wanted; all contiguous.

    `tensors`: the gradient of out, q, k, v and out.
    """
    d_out, q, k, v, out = (_in_rows(x) for x in tensors)
    _check(q, k, v)
    scores = NO_CHANGES
    if dropout_p > 0.0 or bias is not None:
        dropout = Dropout(threshold_of(dropout_p), state) if dropout_p > 0.0 else None
        scores = Scores(bias, None, None, None, None, dropout, None)
    call = Call(
        mask=mask,
        scale=scale,
        layout=layout,
        gear=None,
        out=None,
        out_dtype=None,
        num_splits=None,
        return_lse=True,
        q_seqs=q_seqs,
        kv_seqs=kv_seqs,
        scores=scores,
        deterministic=False,
        tile_rows=None,
    )
    try:
        if not q.is_cuda:  # by an operator, whose derivative is autograd's
            encoded = encode(call)
            zeros = torch.zeros_like(lse)
            places = [0] if wants_bias else []
            found: list[Tensor] = torch.ops.jitattn.attention_backward(
                d_out, zeros, q, k, v, out, lse, *encoded, places
            )
            return found
        call = call._replace(scores=in_fp32(scores))
        wanted = ("bias",) if wants_bias else ()
        gradients = run_backward(q, k, v, out, lse, d_out, None, call, wanted)
    except InvalidInputError as error:
        raise UnsupportedError(str(error)) from error
    return [gradients.dq, gradients.dk, gradients.dv, *gradients.added.values()]


def _windowed(is_causal: bool, left: int | None, right: int | None) -> Mask:
    """Return the mask of window sizes, where None and negative numbers are infinite."""
    left = None if left is None or left < 0 else left
    right = None if right is None or right < 0 else right
    if is_causal:
        return Causal() if left is None else Window(left, 0)
    return Full() if left is None and right is None else Window(left, right)


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient with the strides of torch.empty_like(like)."""
    if gradient.stride() == like.stride():
        return gradient
    wanted = torch.empty_like(like)
    return gradient if gradient.stride() == wanted.stride() else wanted.copy_(gradient)


def _without_copies(bias: Tensor | None) -> Tensor | None:
    """Return a bias whose broadcast dimensions but the last have size 1."""
    if bias is None:
        return None
    for dim in range(bias.dim() - 1):
        if bias.stride(dim) == 0 and bias.shape[dim] > 1:
            bias = bias.narrow(dim, 0, 1)
    return _in_rows(bias)


def _whole(bias: Tensor | None) -> Tensor | None:
    """Return a bias whose gradient is wanted for every element."""
    return None if bias is None else _in_rows(bias)


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


def _seed(state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a dropout state as the memory-efficient kernel returns its own."""
    if state is None:
        return _NO_SEED[0], _NO_SEED[1]
    return state[0].clone(), state[1].clone()  # graphs ask for aligned memory


def _state(seed: Tensor, offset: Tensor, dropout_p: float) -> Tensor:
    """Return the dropout state of the memory-efficient kernel's seed and offset."""
    return torch.stack([seed, offset]) if dropout_p > 0.0 else seed

"""What aten's attention operators have in common: both passes of a call, refusals, and strides."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.api.attention import attention
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.request.problem import Call
from jitattn.request.scores import NO_CHANGES, Scores, in_fp32
from jitattn.run.backward import run_backward
from jitattn.run.forward import run
from jitattn.run.operator_encoding import encode
from jitattn.values.autocast import outside_autocast
from jitattn.values.dropout import Dropout, dropout_state, threshold_of
from jitattn.values.tensors import MAX_HEAD_DIM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from jitattn.values.masks import Mask
    from jitattn.values.sequences import Ragged

_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
_attend: Final = outside_autocast(attention)


def refuse_if(refused: bool, what: str) -> None:
    """Refuse a call, which is then handed on to torch's kernel."""
    if refused:
        raise UnsupportedError(f"{what}: ours does not take it")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None,
    dropout_p: float,
    **given: Any,  # noqa: ANN401 - of `attention`
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute out, the LSE and the state of the dropout, if there is any.

    q, k and v are [B, L, H, D] or [total, H, D], or as `layout` says.
    """
    _check(q, k, v)
    state = None
    if dropout_p > 0.0:
        state = dropout_state(q.device)
        given |= {"dropout_p": dropout_p, "dropout_state": state}
    q, k, v = in_rows(q), in_rows(k), in_rows(v)
    try:
        out, lse = _attend(q, k, v, mask=mask, scale=scale, return_lse=True, **given)
    except InvalidInputError as error:
        raise UnsupportedError(str(error)) from error
    return out, lse, state


def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, layout: str
) -> tuple[Tensor, Tensor]:
    """Compute out and the LSE as `forward` does, of tensors and a mask alone, in less host time."""
    _check(q, k, v)
    try:
        out, lse = run(in_rows(q), in_rows(k), in_rows(v), _plain_call(mask, scale, layout))
    except InvalidInputError as error:
        raise UnsupportedError(str(error)) from error
    return out, lse


@functools.lru_cache(256)
def _plain_call(mask: Mask, scale: float | None, layout: str) -> Call:
    return _call(mask, scale, layout)


def backward(
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
    d_out, q, k, v, out = (in_rows(x) for x in tensors)
    _check(q, k, v)
    scores = NO_CHANGES
    if dropout_p > 0.0 or bias is not None:
        dropout = Dropout(threshold_of(dropout_p), state) if dropout_p > 0.0 else None
        scores = Scores(bias, None, None, None, None, dropout, None)
    call = _call(mask, scale, layout)._replace(q_seqs=q_seqs, kv_seqs=kv_seqs, scores=scores)
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


def _call(mask: Mask, scale: float | None, layout: str) -> Call:
    """Return a call with the LSE, of a mask alone."""
    return Call(
        mask=mask,
        scale=scale,
        layout=layout,
        gear=None,
        out=None,
        out_dtype=None,
        num_splits=None,
        return_lse=True,
        q_seqs=None,
        kv_seqs=None,
        scores=NO_CHANGES,
        deterministic=False,
        tile_rows=None,
    )


def laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient with the strides of torch.empty_like(like)."""
    if gradient.stride() == like.stride():
        return gradient
    wanted = torch.empty_like(like)
    return gradient if gradient.stride() == wanted.stride() else wanted.copy_(gradient)


def in_rows(x: Tensor) -> Tensor:
    """Return a tensor with contiguous rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise UnsupportedError(f"{q.dtype}, {k.dtype} and {v.dtype}: ours takes one of {_DTYPES}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise UnsupportedError(f"head_dim={q.shape[-1]}: ours takes at most {MAX_HEAD_DIM}")

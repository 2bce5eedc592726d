"""Translates xformers' layouts and biases to `jitattn.attention`, and its results back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.compat._core import attention
from jitattn.compat._errors import DoorError, errors_as
from jitattn.compat._gradients import gradients_of
from jitattn.compat.xformers.ops.fmha._bias import AttentionBias, LowerTriangularMask, Translated
from jitattn.errors import UnsupportedError
from jitattn.values.masks import Full

if TYPE_CHECKING:
    from torch import Tensor

_NOTHING: Final = Translated(Full())
#: The core's argument names in error messages, and these functions'.
_WORDS: Final = {
    "q": "query",
    "k": "key",
    "v": "value",
    "bias": "attn_bias",
    "q_seqs": "attn_bias",
    "kv_seqs": "attn_bias",
    "dropout_p": "p",
    "out_dtype": "output_dtype",
    "check the layout argument": "the layout is [B, L, H, D], or [B, L, G, H, D] with groups",
}


@errors_as(DoorError, _WORDS)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None,
    p: float,
    scale: float | None,
    output_dtype: torch.dtype | None,
    *,
    return_lse: bool,
) -> Any:  # noqa: ANN401 - Tensor, or two
    """Compute attention: out, or (out, lse).

    Parameters
    ----------
    query : Tensor, [B, Lq, H, D], [B, Lq, G, H, D] or [B, Lq, D]
    key, value : Tensor, likewise with Lkv

    Returns
    -------
    out : Tensor, as query
    lse : Tensor, [B, H, Lq] or [B, G, H, Lq], fp32; [1, H, total] with a bias over sequences
    """
    found = _NOTHING if attn_bias is None else _of_bias(attn_bias)
    q, k, v, bias = _four_dims(query, key, value, attn_bias, found.bias)
    if found.q_seqs is not None:
        q, k, v = _flat(q, k, v, found.page_size)
    result = attention(
        q,
        k,
        v,
        mask=found.mask,
        scale=scale,
        out_dtype=None if output_dtype is query.dtype else output_dtype,
        return_lse=return_lse,
        q_seqs=found.q_seqs,
        kv_seqs=found.kv_seqs,
        bias=bias,
        dropout_p=p,
    )
    out, lse = result if return_lse else (result, None)
    if found.q_seqs is not None:
        out, lse = out.unsqueeze(0), None if lse is None else lse.unsqueeze(0)
    dims = query.dim()
    if dims == 5:
        groups = query.shape[2:4]
        out = torch.unflatten(out, 2, groups)
        lse = None if lse is None else torch.unflatten(lse, 1, groups)
    elif dims == 3:
        out = out.squeeze(2)
    return (out, lse) if return_lse else out


@errors_as(DoorError, _WORDS)
def gradients(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dv, each as its input, of a call whose result and LSE are given."""
    found = _NOTHING if attn_bias is None else _of_bias(attn_bias)
    # Heads of their own for all of k and v: the gradients of expanded ones are asked for.
    q, k, v, bias = _four_dims(query, key, value, attn_bias, found.bias, expands=True)
    grad, output = (_as_four(x) for x in (grad, output))
    if lse.dim() == 4:
        lse = lse.flatten(1, 2)
    lse = lse[..., : q.shape[1]]  # some operators of the original give more
    if found.q_seqs is not None:
        q, k, v = _flat(q, k, v, found.page_size)
        grad, output, lse = grad[0], output[0], lse[0]
    given: dict[str, Any] = {
        "mask": found.mask,
        "scale": scale,
        "bias": bias,
        "q_seqs": found.q_seqs,
        "kv_seqs": found.kv_seqs,
    }
    results = gradients_of(grad, q, k, v, output.to(q.dtype), lse.contiguous(), given)
    shapes = query.shape, key.shape, value.shape
    dq, dk, dv = (x.reshape(shape) for x, shape in zip(results, shapes, strict=True))
    return dq, dk, dv


def _of_bias(attn_bias: Tensor | AttentionBias) -> Translated:
    """Return what a bias becomes."""
    if isinstance(attn_bias, torch.Tensor):
        return _NOTHING._replace(bias=attn_bias)
    if isinstance(attn_bias, AttentionBias):
        return attn_bias._translated()
    raise DoorError(
        f"attn_bias is a {type(attn_bias).__name__}: it must be a tensor [B, H, Lq, Lkv], an "
        "AttentionBias, or None"
    )


def _four_dims(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None,
    bias: Tensor | None,
    *,
    expands: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q, k and v [B, L, H, D], and a bias [B, H, Lq, Lkv]."""
    dims = query.dim()
    if dims == 4 and key.dim() == value.dim() == 4:
        return query, key, value, bias
    if dims not in (3, 4, 5) or key.dim() != dims or value.dim() != dims:
        raise DoorError(
            f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}: all "
            "must be [B, L, H, D], [B, L, G, H, D] or [B, L, D]"
        )
    if dims == 3:
        allowed = attn_bias is None or isinstance(attn_bias, torch.Tensor)
        if not allowed and type(attn_bias) is not LowerTriangularMask:
            raise DoorError(
                f"attn_bias is a {type(attn_bias).__name__}, and query has shape "
                f"{list(query.shape)}: inputs must be [B, L, H, D] with it"
            )
        bias = None if bias is None or bias.dim() == 4 else bias.unsqueeze(1)
        return query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2), bias
    if query.shape[2:4] != key.shape[2:4] or key.shape[2:4] != value.shape[2:4]:
        raise DoorError(
            f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}: groups "
            "and heads must be equal; expand key and value"
        )
    if bias is not None and bias.dim() == 5:
        bias = bias.flatten(1, 2)
    if not expands and _is_expanded(key) and _is_expanded(value):
        return query.flatten(2, 3), key.select(3, 0), value.select(3, 0), bias
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3), bias


def _is_expanded(x: Tensor) -> bool:
    """Return whether the heads of a group are one, expanded, whose gradient may be the first's."""
    return (x.shape[3] == 1 or x.stride(3) == 0) and not (x.is_leaf and x.requires_grad)


def _as_four(x: Tensor) -> Tensor:
    """Return a result as [B, L, H, D]."""
    return x.unsqueeze(2) if x.dim() == 3 else x.flatten(2, 3) if x.dim() == 5 else x


def _flat(q: Tensor, k: Tensor, v: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [total, H, D], and k and v likewise, or in pages."""
    if q.shape[0] != 1 or k.shape[0] != 1 or v.shape[0] != 1:
        raise DoorError(
            f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}: with a bias over "
            "sequences the batch size must be 1"
        )
    if not page_size:
        return q.squeeze(0), k.squeeze(0), v.squeeze(0)
    if k.shape[1] % page_size or v.shape[:3] != k.shape[:3]:
        raise DoorError(
            f"key {list(k.shape)}, value {list(v.shape)}: their rows must be whole pages of "
            f"{page_size}, of as many heads"
        )
    count, (heads, dim), dim_v = k.shape[1] // page_size, k.shape[2:], v.shape[3]
    k, v = k.view(count, page_size, heads, dim), v.view(count, page_size, heads, dim_v)
    return q.squeeze(0), k, v


def refuse_dropout(p: float) -> None:
    """Refuse dropout in functions whose results are used without autograd."""
    if p != 0.0:
        raise UnsupportedError(
            f"p={p}: functions without autograd have no dropout; call memory_efficient_attention"
        )

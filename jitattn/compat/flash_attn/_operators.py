"""Registers FlashAttention's torch operators under their names.

`torch.ops.flash_attn._flash_attn_forward` and the like. Where a real FlashAttention is installed,
that name is its own, and ours are `torch.ops.jitattn_flash_attn`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.compat import is_installed
from jitattn.compat.flash_attn import _extension as extension
from jitattn.compat.flash_attn._translate import rounded_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NAMESPACE: Final = "jitattn_flash_attn" if is_installed("flash_attn") else "flash_attn"
_WINDOW: Final = "int window_size_left, int window_size_right, float softcap"
_SWAA: Final = "int keep_first, bool force_fa_decode"
_RESULTS: Final = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse"
_ROOM: Final = "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv"
_LENGTHS: Final = "Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_MOST: Final = "int max_seqlen_q, int max_seqlen_k"
_TAIL: Final = "Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None"
_SOFTMAX: Final = "float dropout_p, float softmax_scale"
_FOUR: Final = "(Tensor, Tensor, Tensor, Tensor)"
_SCHEMAS: Final = {
    "_flash_attn_forward": f"(Tensor q, Tensor k, Tensor v, {_SOFTMAX}, bool causal, {_WINDOW}, "
    f"{_SWAA}, Tensor? alibi_slopes, bool return_softmax) -> {_FOUR}",
    "_flash_attn_varlen_forward": f"(Tensor q, Tensor k, Tensor v, {_LENGTHS}, {_MOST}, {_SOFTMAX},"
    " bool causal, int window_size_left=-1, int window_size_right=-1, float softcap=0.0, "
    "int keep_first=0, bool force_fa_decode=False, Tensor? alibi_slopes=None, "
    "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, "
    f"Tensor? seqused_k=None, bool zero_tensors=False) -> {_FOUR}",
    "_flash_attn_backward": f"({_RESULTS}, {_ROOM}, {_SOFTMAX}, bool causal, {_WINDOW}, {_SWAA}, "
    f"{_TAIL}) -> Tensor",
    "_flash_attn_varlen_backward": f"({_RESULTS}, {_ROOM}, {_LENGTHS}, {_MOST}, {_SOFTMAX}, "
    f"bool causal, {_WINDOW}, {_SWAA}, {_TAIL}, bool zero_tensors=False) -> Tensor",
    "varlen_fwd": f"(Tensor q, Tensor k, Tensor v, Tensor? out, {_LENGTHS}, Tensor? seqused_k, "
    f"Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, {_MOST}, {_SOFTMAX}, "
    f"bool zero_tensors, bool causal, {_WINDOW}, {_SWAA}, bool return_softmax) -> {_FOUR}",
}


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    keep_first: int,
    force_fa_decode: bool,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, ...]:
    """Return out, lse, S_dmask and rng_state; `flash_attn_2_cuda.fwd`."""
    found = extension.fwd(
        q,
        k,
        v,
        None,
        alibi_slopes,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        keep_first,
        force_fa_decode,
        return_softmax,
        None,
    )
    return tuple(found)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, ...]:
    """Return out, lse, S_dmask and rng_state; `flash_attn_2_cuda.varlen_fwd`."""
    return _varlen_fwd(
        q,
        k,
        v,
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        leftpad_k,
        block_table,
        alibi_slopes,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        zero_tensors,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        keep_first,
        force_fa_decode,
        return_softmax,
    )


def _varlen_fwd(*given: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    """Return out, lse, S_dmask and rng_state; `flash_attn_2_cuda.varlen_fwd` but for a generator.

    An operator's result may not be one of its arguments: with `out`, the first is a copy.
    """
    positional: tuple[Any, ...] = (*given, None)
    out, lse, dmask, rng_state = extension.varlen_fwd(*positional)
    return out if given[3] is None else out.clone(), lse, dmask, rng_state


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    keep_first: int,
    force_fa_decode: bool,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Write dq, dk and dv, and return softmax_d; `flash_attn_2_cuda.bwd`."""
    return extension.bwd(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        alibi_slopes,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        keep_first,
        force_fa_decode,
        deterministic,
        None,
        rng_state,
    )[3]


def _flash_attn_varlen_backward(
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
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    keep_first: int,
    force_fa_decode: bool,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Write dq, dk and dv, and return softmax_d; `flash_attn_2_cuda.varlen_bwd`."""
    return extension.varlen_bwd(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        alibi_slopes,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        zero_tensors,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        keep_first,
        force_fa_decode,
        deterministic,
        None,
        rng_state,
    )[3]


def _fake_results(q: Tensor, lse: tuple[Any, ...], dmask: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(lse, dtype=torch.float32),
        q.new_empty(dmask),
        q.new_empty((2,), dtype=torch.int64),
    )


def _forward_fake(q: Tensor, k: Tensor, *more: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    batch, len_q, heads, _ = q.shape
    dmask = (batch, heads, rounded_up(len_q), rounded_up(k.shape[1])) if more[-1] else (0,)
    return _fake_results(q, (batch, heads, len_q), dmask)


def _varlen_forward_fake(*given: Any, **named: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    call = dict(zip(names, given, strict=False)) | named
    wants = named.get("return_softmax", given[16] if len(given) > 16 else False)
    return _fake_varlen(
        call["q"], call["cu_seqlens_q"], call["max_seqlen_q"], call["max_seqlen_k"], wants
    )


def _varlen_fwd_fake(*given: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    return _fake_varlen(given[0], given[4], given[10], given[11], given[-1])


def _fake_varlen(
    q: Tensor, cu_seqlens_q: Tensor, most_q: int, most_k: int, wants: bool
) -> tuple[Tensor, ...]:
    total, heads, _ = q.shape
    batch = cu_seqlens_q.shape[0] - 1
    dmask = (batch, heads, rounded_up(most_q), rounded_up(most_k)) if wants else (0,)
    return _fake_results(q, (heads, total), dmask)


def _backward_fake(dout: Tensor, q: Tensor, *more: Any, **named: Any) -> Tensor:  # noqa: ANN401
    del dout, more, named
    batch, len_q, heads, _ = q.shape
    return q.new_empty((batch, heads, rounded_up(len_q)), dtype=torch.float32)


def _varlen_backward_fake(dout: Tensor, q: Tensor, *more: Any, **named: Any) -> Tensor:  # noqa: ANN401
    del dout
    total, heads, _ = q.shape
    batch = (named["cu_seqlens_q"] if "cu_seqlens_q" in named else more[7]).shape[0] - 1
    return q.new_empty((heads, total + 128 * batch), dtype=torch.float32)


_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")
_OPERATORS: Final[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "_flash_attn_forward": (_flash_attn_forward, _forward_fake),
    "_flash_attn_varlen_forward": (_flash_attn_varlen_forward, _varlen_forward_fake),
    "_flash_attn_backward": (_flash_attn_backward, _backward_fake),
    "_flash_attn_varlen_backward": (_flash_attn_varlen_backward, _varlen_backward_fake),
    "varlen_fwd": (_varlen_fwd, _varlen_fwd_fake),
}
for _name, (_function, _fake) in _OPERATORS.items():
    _library.define(_name + _SCHEMAS[_name])
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

_operators: Any = getattr(torch.ops, NAMESPACE)
_wrapped_flash_attn_forward = _operators._flash_attn_forward
_wrapped_flash_attn_varlen_forward = _operators._flash_attn_varlen_forward
_wrapped_flash_attn_backward = _operators._flash_attn_backward
_wrapped_flash_attn_varlen_backward = _operators._flash_attn_varlen_backward

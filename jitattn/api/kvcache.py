"""`attention_with_kvcache`: append new keys and values to a cache in place, then attend to it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, Literal, Unpack, overload

import torch

from jitattn.api.functions import MAY_HOLD_FUNCTIONS, traced_apart
from jitattn.errors import StridesError, WithoutMemoryError
from jitattn.request.problem import Call
from jitattn.request.score_checks import softcap_of
from jitattn.request.scores import Scores
from jitattn.run.indirect import in_transform, is_watched, kvcache_indirectly
from jitattn.run.kvcache import (
    KvCache,
    check_captured,
    check_kinds,
    checked_length,
    run_with_kvcache,
)
from jitattn.run.kvcache_operators import call_kvcache_operator
from jitattn.values.foreign import refuse as refuse_foreign
from jitattn.values.masks import Causal
from jitattn.values.sequences import checked_max_length
from jitattn.values.tensors import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.api.options import KvCacheOptions
    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import Mask
    from jitattn.values.rotary import Rotary
    from jitattn.values.sequences import Ragged

_CAUSAL: Final = Causal()


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    *,
    length: Tensor | int,
    return_lse: Literal[False] = ...,
    **options: Unpack[KvCacheOptions],
) -> Tensor: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    *,
    length: Tensor | int,
    return_lse: Literal[True],
    **options: Unpack[KvCacheOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    *,
    length: Tensor | int,
    return_lse: bool,
    **options: Unpack[KvCacheOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    length: Tensor | int,
    rotary: Rotary | None = None,
    left_pad: Tensor | None = None,
    batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    max_length: int | None = None,
    mask: Mask = _CAUSAL,
    scale: float | None = None,
    layout: str = "bshd",
    gear: int | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    q_seqs: Ragged | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None = None,
    q_offset: QOffset | None = None,
    **foreign: Any,
) -> Any:
    """Append new keys and values to a cache in place, and attend to all of it.

    On a GPU, one small kernel runs before that of `attention`; neither synchronizes with the
    device, and both can be captured in a CUDA graph, in which `length` may grow between replays.
    There are no gradients.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D]
        As in `attention`; [total, Hq, D] with `q_seqs`.
    k_cache : Tensor, [Bc, Lc, Hkv, D], or [num_pages, page_size, Hkv, D] with a block table
        Written in place. Any strides with the last equal to 1. (Of q, k and v, a copy is made where
        it is not.)
    v_cache : Tensor, likewise with Dv
    k, v : Tensor, [B, num_new, Hkv, D] and [B, num_new, Hkv, Dv], optional
        New tokens, which become the rows length[b] … of sequence b; with `q_seqs` those of the
        queries' tokens, [total, Hkv, D]. Left out: nothing is appended.
    length : int or Tensor [B], int32 or int64
        Rows of the cache that are in use before the call, left padding included.
    rotary : Rotary, optional
        Rotates the new keys by their rows, and the queries by those of the new tokens (with
        ``mask=Full()``: all of them by length[b]). Rotated values are rounded to the dtype of q.
        The cache holds rotated keys. Needs k and v.
    left_pad : Tensor, [B], int32 or int64, optional
        Number of padding rows at the beginning of each sequence. If `length` is a tensor and k is
        left out, it must have the same dtype.
    batch_idx : Tensor, [B], int32 or int64, optional
        Cache row of each sequence; not with a block table. Two sequences of one call may share a
        row only if nothing is appended.
    block_table : Tensor, [B, max_pages], int32 or int64, optional
        The pages of each sequence, in order.
    max_length : int, optional
        Upper bound of the keys of a sequence after the call. Keys beyond it are not visible.
    mask : default Causal()
        As in `attention`, over the keys from left_pad on.
    scale, layout, gear, out, out_dtype, num_splits, return_lse
        As in `attention`.
    bias, relative_bias, alibi_slopes, softcap, sinks, score_mod
        As in `attention`; columns of a bias count from left_pad on.
    q_offset : int, Tensor [B] of ints, or "bottom_right", default 0
        Added to the q_idx of functions. Other masks are aligned as they say: the queries are the
        last tokens.
    q_seqs : Ragged, optional
        Tokens of each sequence, the same for q, k and v: prompts and single steps in one call.

    Returns
    -------
    out, or (out, lse)
        As `attention` returns them.

    Raises
    ------
    InvalidInputError
        An argument breaks a rule; nothing was written. Lengths on a GPU are not checked: tokens
        that do not fit into their sequence are dropped, never written elsewhere.
    UnsupportedError, CompileError, LaunchError, CacheMissError
        As `attention`.

    Examples
    --------
    >>> import torch, jitattn
    >>> k_cache, v_cache = torch.zeros(2, 1, 64, 2, 16)
    >>> q, k, v = torch.randn(1, 3, 4, 16), *torch.randn(2, 1, 3, 2, 16)
    >>> jitattn.attention_with_kvcache(q, k_cache, v_cache, k, v, length=5).shape
    torch.Size([1, 3, 4, 16])
    >>> torch.equal(k_cache[:, 5:8], k)
    True
    """
    if foreign:
        refuse_foreign("attention_with_kvcache", foreign, _OWN_NAMES)
    if not isinstance(length, torch.Tensor):
        length = checked_length(length)
    max_length = checked_max_length("attention_with_kvcache", max_length)
    cache = KvCache(k, v, length, rotary, left_pad, batch_idx, block_table, max_length)
    check_kinds(q, k_cache, v_cache, cache, q_seqs)
    softcap = None if softcap is None else softcap_of(softcap)
    scores = Scores(bias, relative_bias, alibi_slopes, softcap, sinks)
    if score_mod is not None or type(mask) in MAY_HOLD_FUNCTIONS:
        offset = 0 if q_offset is None else q_offset
        mask, function = traced_apart(
            q, k_cache, mask, score_mod, offset, layout, q_seqs, None, finds_blocks=False
        )
        check_captured(function)
        scores = scores._replace(function=function)
    call = Call(
        mask, scale, layout, gear, out, out_dtype, num_splits, return_lse, q_seqs, None, scores
    )
    if torch.compiler.is_dynamo_compiling():
        return call_kvcache_operator(q, k_cache, v_cache, cache, call)
    are_plain = type(q) in PLAIN and type(k_cache) in PLAIN and type(v_cache) in PLAIN
    if not are_plain or is_watched() or in_transform():
        return kvcache_indirectly(q, k_cache, v_cache, cache, call)
    try:
        return run_with_kvcache(q, k_cache, v_cache, cache, call)
    except (WithoutMemoryError, StridesError):
        return kvcache_indirectly(q, k_cache, v_cache, cache, call)


#: Keyword arguments of `attention_with_kvcache`.
_OWN_NAMES: Final = tuple(
    name
    for name, parameter in inspect.signature(attention_with_kvcache).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)

"""`attention`, the core function; see its docstring."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from jitattn.api import interop
from jitattn.api.functions import MAY_HOLD_FUNCTIONS, moved_mask, traced_apart
from jitattn.api.nested import are_nested, attention_of_nested
from jitattn.errors import NestedError, StridesError, WithoutMemoryError
from jitattn.request.problem import Call
from jitattn.request.score_checks import softcap_of
from jitattn.request.scores import NO_CHANGES, Scores, in_fp32
from jitattn.run.forward import run
from jitattn.run.indirect import (
    attention_indirectly,
    in_transform,
    is_tracing,
    num_dispatch_modes,
)
from jitattn.run.operators import call_operator
from jitattn.run.unit_strides import with_unit_strides
from jitattn.values.autocast import cast_inputs
from jitattn.values.dropout import Dropout, check_state, threshold_of
from jitattn.values.dropout import dropout_state as draw_state
from jitattn.values.foreign import refuse as refuse_foreign
from jitattn.values.masks import Full
from jitattn.values.tensors import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from jitattn.api.options import AttentionOptions, SupportsDLPack
    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import Mask
    from jitattn.values.norm import L2Norm
    from jitattn.values.sequences import KvSequences, QSequences

_FULL = Full()
_NEW = tuple.__new__


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[AttentionOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: SupportsDLPack,
    k: SupportsDLPack,
    v: SupportsDLPack,
    *,
    return_lse: bool = ...,
    **options: Unpack[AttentionOptions],
) -> Any: ...  # noqa: ANN401 - arrays of the library that q came from
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Mask = _FULL,
    scale: float | None = None,
    layout: str = "bshd",
    gear: int | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    q_seqs: QSequences = None,
    kv_seqs: KvSequences = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    qk_norm: L2Norm | None = None,
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None = None,
    q_offset: QOffset | None = None,
    deterministic: bool = False,
    tile_rows: int | None = None,
    **foreign: Any,
) -> Any:
    """Compute exact scaled dot-product attention, softmax(scale q k^T) v.

    On a GPU the kernel is compiled when it is first needed (0.3 to 1.5 s), kept on disk, and
    launched in torch's current stream; there is no host synchronisation, and a warm call can be
    captured in a CUDA graph. CPU tensors take the CPU path. Both are differentiable: see Notes.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D]
        fp16, bf16, fp32, on the CPU also fp64; D from 1 to 256. Any strides and alignment (16-byte
        aligned rows are fastest); of q, k and v whose last stride is not 1 a copy is made, with one
        warning. Arrays with ``__dlpack__`` (CuPy, JAX,
        numpy) are accepted too, and the result is of the same kind; so are nested tensors of torch,
        jagged (without a copy) or strided, whose LSE is that of a ragged q.
    k : Tensor, [B, Lkv, Hkv, D]
        Same dtype and device. Hq % Hkv == 0; query head h reads kv head h // (Hq // Hkv).
    v : Tensor, [B, Lkv, Hkv, Dv]
        Dv from 1 to 256, equal to D or not.
    mask : Mask, default Full()
        Full, Causal, Window, LocalStride, BlockSparse, PerHead, KeyPadding, Dense, MaskMod (a
        function of your own), or several combined with &. Causal is aligned to the bottom right by
        default. Key blocks that a positional rule (all but KeyPadding and Dense) hides from a tile
        of queries are skipped, and those that a MaskMod cannot see.
    scale : float, default 1 / sqrt(D), and 8 with `qk_norm`
        Any finite number, also negative or 0. Scores beyond 1e9 have no fractional bits in fp32,
        and may give NaN on a GPU.
    layout : "bshd" or "bhsd"
        With "bhsd", q is [B, Hq, Lq, D] and k, v and out likewise.
    gear : int from 0 to 4, default 2 for 16-bit inputs and 0 for fp32
        Trades precision for speed. 16-bit inputs: 0 and 1 split P (fp32-accurate); 2 has
        FlashAttention-2's numerics; 3 accumulates P V of fp16 inputs in fp16 on GPUs where that is
        faster (GeForce of sm_86 and sm_89). fp32 inputs: 0 to 2 are fp32-accurate with three MMAs
        per product, 3 uses one. 4: INT8 Q Kᵀ with fp16 accumulation of P V if a KV head has more
        than 64 query rows and the mask is positional; paged KV: INT8 Q Kᵀ only, quantized at every
        call; otherwise as 3. (`plan/prepare.py` lists the exact conditions, and the memory that it
        takes; a NaN in k then reaches all rows of its head.) Gradients have the numerics of gear 2.
        See `set_default_gear`.
    out : Tensor, [B, Lq, Hq, Dv], optional
        Tensor for the result; it may not overlap the inputs.
    out_dtype : torch.dtype, default the dtype of q
        torch.float32 returns the accumulators unrounded.
    num_splits : int, 1 to 256, optional
        Number of splits of the keys (split-KV), merged in a fixed order. Chosen if left out. With
        a fixed number, the same inputs in a larger batch give the same bits.
    return_lse : bool
        Return the log-sum-exp as well.
    q_seqs : Ragged or Padded, optional
        Layout of the sequences of q. With `Ragged`, q is [total, Hq, D], and out likewise; with
        `Padded`, q is batched and only some of its rows are real. Rows that belong to no sequence
        are 0 in a new out, and unchanged in a given one.
    kv_seqs : Ragged, Padded or Paged, optional
        Layout of the sequences of k and v, independent of q. With `Ragged`, k is
        [total, Hkv, D]; with `Paged`, [num_pages, page_size, Hkv, D]. `layout` is for batched
        tensors only. Positions count from the first real token, and each sequence has its own
        diagonal of `Causal`.
    bias : Tensor, [B or 1, Hq or 1, Lq or 1, Lkv], dtype of q or fp32, optional
        Added to the scores. With `q_seqs` or `kv_seqs`, rows and columns count from the first ones
        of each sequence, and may exceed its length. -inf hides a key; on a GPU, so does any value
        below -3e7, which matters only for a row without other keys: its result is 0, not the mean.
    relative_bias : Tensor, [Hq or 1, 2 R + 1], optional
        Added to the scores by distance: entry d + R, where d is key - query (of positions aligned
        to the bottom right), clamped to [-R, R]. fp16, bf16 or fp32 (on the CPU also fp64), as
        `alibi_slopes` and `sinks`; a GPU computes with a copy in fp32.
    alibi_slopes : Tensor, [Hq] or [B, Hq], optional
        -slope * |key - query| is added to the scores, of positions aligned to the bottom right.
        Press et al., arXiv:2108.12409.
    softcap : float, optional
        Scores become softcap * tanh(score / softcap) before biases are added.
    sinks : Tensor, [Hq], optional
        A logit per head that takes part in the softmax but has no value. The LSE excludes it.
    dropout_p : float, default 0
        Fraction of the weights dropped after the softmax; the others are divided by 1 - p. Rounded
        to a multiple of 2^-16. The LSE does not include it.
    dropout_state : Tensor, int64 [2], default drawn from torch's generator of the device
        Seed and offset of the dropout (`jitattn.dropout_state`, `jitattn.dropout_mask`).
    qk_norm : L2Norm, optional
        Cosine attention: q and k are scaled to length 1, or already have it.
    score_mod : callable, optional
        ``f(score, b, h, q_idx, kv_idx) -> score``, called once with symbols and compiled into the
        kernel: what becomes of each scaled score after `softcap`, biases and slopes, before masks.
        Indices count sequences, query heads, and the rows and keys of a sequence from 0. It may
        compute with them as with 0-dimensional tensors of int32 (the score: fp32), and read
        captured tensors at indices; -inf hides a pair. Numbers and tensors that it holds are
        arguments: others compile nothing anew. Gradients flow through the score, and to the
        captured tensors that it is made of, bitwise reproducible: what a pair adds to them is
        rounded to a multiple of 2^-k of the largest, with k = 61 - log2(number of pairs).
    q_offset : int, Tensor [B] of ints, or "bottom_right", optional
        The position of the first query among the keys, as a shard of a longer sequence has it, for
        every positional rule in place of its own alignment; "bottom_right" is Lkv - Lq of each
        sequence. It is added to the q_idx of `score_mod`, and of a `MaskMod` that has none of its
        own. Left out, rules are aligned as they say, and q_idx counts from 0. (Biases by distance
        stay aligned to the bottom right.)
    deterministic : bool
        Make dq of the backward pass bitwise reproducible, at 1.3 to 1.4 times its time.
        (Everything else is always reproducible.) `torch.use_deterministic_algorithms(True)` has
        the same effect, also with ``warn_only``.
    tile_rows : 16, 64 or 128, optional
        Row class of the kernel on a GPU: the query rows per KV head that its tile is made for.
        Chosen if left out. For tuning: results differ in the last bits only.

    Returns
    -------
    out : Tensor, [B, Lq, Hq, Dv]
        Rows that may attend to nothing are 0, never NaN.
    lse : Tensor, [B, Hq, Lq], or [Hq, total] with a ragged q; fp32
        Natural logarithm of the row sums; -inf for rows that may attend to nothing, or belong to no
        sequence. Only with ``return_lse``.

    Raises
    ------
    InvalidInputError
        An argument breaks a rule; nothing was launched. Of a keyword that other attention functions
        have, and this one has not, it names ours, and is a TypeError as well.
    UnsupportedError
        Valid, but no kernel exists: a GPU older than sm_80, or a gradient that is not computed on
        a GPU: of keys that sequences of `Ragged` share, or of second order.
    CompileError
        NVRTC is missing or rejected the source.
    LaunchError
        CuPy is missing; the driver refused the kernel; during a CUDA graph capture, a kernel was
        not loaded (call `jitattn.warmup` before) or block lists were not made (make one call
        before); or the process was forked from one that had used CUDA.
    CacheMissError
        The kernel is not in the cache, and ``JITATTN_NO_COMPILE`` forbids compiling it.

    Notes
    -----
    Gradients, on a GPU: of q, k, v, `bias` (summed over the dimensions in which it is broadcast),
    `relative_bias`, `alibi_slopes`, `sinks` and ``L2Norm(head_scale)``, and through the LSE. The
    backward pass needs, besides the gradients, 4 bytes per element of q and 8 per row and head of
    q. Long fp32 sequences also need as much memory as q, k, v and the gradient of `out`
    (`plan/prepare.py`). Pages, and rows named by `batch_idx`, whose gradients are summed over the
    sequences that share them, need 4 bytes per element of k and v, of `max_length` keys per
    sequence; more than about 100,000 queries per key, 4 bytes per element of k and v.
    Tensors that are saved for backward must not be written to before it: autograd raises. First
    derivatives only; the CPU path has every order, and forward mode. torch.func's grad, vjp, jacrev
    and vmap work on both.

    Tracers (torch.compile, torch.export, make_fx, torch.jit.trace) and dispatch modes see
    torch.library operators; meta and fake tensors give results of their kind. Inside torch.autocast
    of their device type, q, k, v and `bias` are cast to its dtype, but for fp64 ones, and out has
    it too; gradients have the dtypes of the inputs. Nothing else of the call is subject to it.

    Bitwise reproducible: two runs on the same inputs give the same bits. A NaN in q or k reaches
    the rows that see it; one in v may also reach rows from which it is hidden, as 0 * NaN. Papers:
    Dao, "FlashAttention-2", arXiv:2307.08691; Milakov and Gimelshein, "Online normalizer
    calculation for softmax", arXiv:1805.02867.

    Examples
    --------
    >>> import torch, jitattn
    >>> q = torch.randn(1, 8, 32, 128)
    >>> k = v = torch.randn(1, 1024, 8, 128)
    >>> jitattn.attention(q, k, v, mask=jitattn.Causal()).shape
    torch.Size([1, 8, 32, 128])
    """
    if foreign:
        refuse_foreign("attention", foreign, _OWN_NAMES)
    if is_dynamo_compiling() or torch._C._is_any_autocast_enabled():
        q, k, v, bias = _in_autocast(q, k, v, bias)
    scores = NO_CHANGES
    tensors_are_none = bias is relative_bias is alibi_slopes is sinks is None
    numbers_are_none = softcap is None and qk_norm is None and dropout_p == 0.0
    function = None
    if q_offset is not None:
        mask = moved_mask(q, k, mask, q_offset, layout, q_seqs, kv_seqs)
    if score_mod is not None or type(mask) in MAY_HOLD_FUNCTIONS:
        offset = 0 if q_offset is None else q_offset
        mask, function = traced_apart(q, k, mask, score_mod, offset, layout, q_seqs, kv_seqs)
    if not (tensors_are_none and numbers_are_none):
        scores = _scores(
            q,
            bias,
            relative_bias,
            alibi_slopes,
            softcap,
            sinks,
            dropout_p,
            dropout_state,
            qk_norm,
        )
    if function is not None:
        scores = scores._replace(function=function)
    values = (
        mask,
        scale,
        layout,
        gear,
        out,
        out_dtype,
        num_splits,
        return_lse,
        q_seqs,
        kv_seqs,
        scores,
        deterministic,
        tile_rows,
    )
    if is_dynamo_compiling():
        if are_nested(q, k, v):
            return attention_of_nested(q, k, v, Call(*values))
        q, k, v = with_unit_strides(q, k, v)
        return call_operator(q, k, v, Call(*values))
    call = _NEW(Call, values)  # what Call(*values) does, at half the cost
    is_plain = type(q) is type(k) is type(v) is Tensor or {type(q), type(k), type(v)} <= PLAIN
    if is_plain and not (num_dispatch_modes() or is_tracing() or in_transform()):
        try:
            return run(q, k, v, call)
        except (WithoutMemoryError, StridesError):
            return attention_indirectly(q, k, v, call)
        except NestedError:
            pass
    if are_nested(q, k, v):
        return attention_of_nested(q, k, v, call)
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        return attention_indirectly(q, k, v, call)
    tensors = interop.from_all({"q": q, "k": k, "v": v}, out=out)
    result = run(tensors["q"], tensors["k"], tensors["v"], call._replace(out=tensors.get("out")))
    if isinstance(result, Tensor):
        return interop.to_kind_of(result, q) if out is None else out
    own, lse = result
    return interop.to_kind_of(own, q) if out is None else out, interop.to_kind_of(lse, q)


#: Keyword arguments of `attention`.
_OWN_NAMES = tuple(
    name
    for name, parameter in inspect.signature(attention).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


def _in_autocast(*tensors: Any) -> list[Any]:  # noqa: ANN401 - arrays of any library, or None
    """Cast q, k, v and a bias as autocast asks, if they are tensors of torch."""
    if not isinstance(tensors[0], Tensor) or tensors[0].dtype is torch.float64:
        return list(tensors)
    return cast_inputs(tensors[0].device.type, *tensors)


def _scores(
    q: Any,  # noqa: ANN401 - Tensor, or an array of another library
    bias: Tensor | None,
    relative_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_state: Tensor | None,
    qk_norm: L2Norm | None,
) -> Scores:
    """Check the score modifiers as far as possible without q."""
    if not isinstance(q, Tensor):
        q = interop.from_all({"q": q})["q"]
    dropout = None
    is_off = type(dropout_p) is float and dropout_p == 0.0
    threshold = 0 if is_off else threshold_of(dropout_p)
    if threshold:
        state = draw_state(q.device) if dropout_state is None else dropout_state
        check_state(state, q.device)
        dropout = Dropout(threshold, state)
    softcap = None if softcap is None else softcap_of(softcap)
    scores = Scores(bias, relative_bias, alibi_slopes, softcap, sinks, dropout, qk_norm)
    return in_fp32(scores) if q.is_cuda else scores


def bind(
    q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]
) -> tuple[dict[str, Tensor], Call]:
    """Split the arguments of `attention` into tensors and others, with defaults filled in.

    Raises
    ------
    UnknownArgumentError
        `attention` has no such argument.
    """
    foreign = {name: arguments[name] for name in arguments if name not in _OWN_NAMES}
    if foreign:
        refuse_foreign("attention", foreign, _OWN_NAMES)
    bound = inspect.signature(attention).bind(q, k, v, **arguments)
    bound.apply_defaults()
    given = bound.arguments
    tensors = interop.from_all({name: given[name] for name in ("q", "k", "v")}, out=given["out"])
    of_scores = list(inspect.signature(_scores).parameters)[1:]
    scores = _scores(tensors["q"], *(given[name] for name in of_scores))
    q_offset, placed = given["q_offset"], (given["layout"], given["q_seqs"], given["kv_seqs"])
    if q_offset is not None:
        given["mask"] = moved_mask(tensors["q"], tensors["k"], given["mask"], q_offset, *placed)
    mask, function = traced_apart(
        tensors["q"],
        tensors["k"],
        given["mask"],
        given["score_mod"],
        0 if q_offset is None else q_offset,
        *placed,
    )
    scores = scores._replace(function=function)
    others = {name: given[name] for name in Call._fields if name != "scores"}
    others["out"], others["mask"] = tensors.get("out"), mask
    return tensors, Call(**others, scores=NO_CHANGES if scores == NO_CHANGES else scores)

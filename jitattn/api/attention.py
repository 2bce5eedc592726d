"""`attention`, the core function; see its docstring."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from jitattn.api import interop
from jitattn.errors import WithoutMemoryError
from jitattn.request.problem import Call
from jitattn.request.score_checks import softcap_of
from jitattn.request.scores import NO_CHANGES, Scores, in_fp32
from jitattn.run.forward import run
from jitattn.run.indirect import attention_indirectly, is_tracing, num_dispatch_modes
from jitattn.run.operators import call_operator
from jitattn.values.dropout import Dropout, check_state, threshold_of
from jitattn.values.dropout import dropout_state as draw_state
from jitattn.values.masks import Full
from jitattn.values.tensors import PLAIN

if TYPE_CHECKING:
    from jitattn.values.masks import Mask
    from jitattn.values.norm import L2Norm
    from jitattn.values.sequences import KvSequences, QSequences

_FULL = Full()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    deterministic: bool = False,
    tile_rows: int | None = None,
) -> Any:  # noqa: ANN401 - Tensor or (Tensor, Tensor), or arrays of the library that q came from
    """Compute exact scaled dot-product attention, softmax(scale q k^T) v.

    On a GPU the kernel is compiled when it is first needed (0.3 to 1.5 s), kept on disk, and
    launched in torch's current stream; there is no host synchronisation, and a warm call can be
    captured in a CUDA graph. CPU tensors take the CPU path. Both are differentiable: see Notes.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D]
        fp16, bf16, fp32, on the CPU also fp64; D from 1 to 256. Any strides with the last equal to
        1, any alignment (16-byte aligned rows are fastest). Arrays with ``__dlpack__`` (CuPy, JAX,
        numpy) are taken too, and the result comes back as the same kind.
    k : Tensor, [B, Lkv, Hkv, D]
        Same dtype and device. Hq % Hkv == 0; query head h reads kv head h // (Hq // Hkv).
    v : Tensor, [B, Lkv, Hkv, Dv]
        Dv from 1 to 256, equal to D or not.
    mask : Mask, default Full()
        Full, Causal, Window, LocalStride, BlockSparse, PerHead, KeyPadding, Dense, or several with
        &: who sees whom. Causal is aligned to the bottom right unless it says otherwise. Blocks of
        keys that positions hide from a tile of queries (all but KeyPadding and Dense) are not
        visited.
    scale : float, default 1 / sqrt(D), and 8 with `qk_norm`
        Any finite number; negative and 0 too. Scores beyond 1e9 have no fractions in fp32, and may
        give NaN on a GPU.
    layout : "bshd" or "bhsd"
        With "bhsd", q is [B, Hq, Lq, D] and k, v and out likewise.
    gear : int from 0 to 4, default 2 for 16-bit inputs and 0 for fp32
        Precision against speed. 16-bit inputs: 0 and 1 split P (fp32-accurate), 2 is
        FlashAttention-2's numerics, 3 sums P V of fp16 in fp16 on the cards that are faster then
        (GeForce of sm_86 and sm_89); fp32 inputs: 0 to 2 are fp32-accurate, 3 takes one product
        where these take three (`run/split_fp32.py` says of what). 4 brings q and k to 8 bits,
        and sums in fp16, for more than 64 query rows of a kv head and masks of positions, of keys
        in pages at every call (`run/quantize.py` says which calls, and what memory that takes; a
        NaN in k reaches all rows of its head then); other calls are as with 3. Gradients have the
        numerics of gear 2. See `set_default_gear`.
    out : Tensor, [B, Lq, Hq, Dv], optional
        Where to write the result; it may not overlap the inputs.
    out_dtype : torch.dtype, default the dtype of q
        torch.float32 returns the accumulators unrounded.
    num_splits : int, 1 to 256, optional
        Parts into which the keys are cut, to be merged in a fixed order. Chosen if left out. With a
        fixed number, the same inputs in a bigger batch give the same bits.
    return_lse : bool
        Return the log-sum-exp as well.
    q_seqs : Ragged or Padded, optional
        Where the sequences of q lie. With `Ragged`, q is [total, Hq, D], and out likewise; with
        `Padded`, q is batched and only some of its rows are real. Rows that belong to no sequence
        are 0 in a new out, and keep what they held in a given one.
    kv_seqs : Ragged, Padded or Paged, optional
        Where those of k and v lie, independently of q. With `Ragged`, k is [total, Hkv, D]; with
        `Paged`, [num_pages, page_size, Hkv, D]. `layout` is for batched tensors only. Positions
        count from the first real token, and the diagonal of `Causal` is that of each sequence.
    bias : Tensor, [B or 1, Hq or 1, Lq or 1, Lkv], dtype of q or fp32, optional
        Added to the scores. With sequences of their own, rows and columns count from the first ones
        of each, and may be more than there are. -inf hides; on a GPU, so does what is below -3e7,
        which differs only where a row has nothing else: it gives 0, not the mean.
    relative_bias : Tensor, [Hq or 1, 2 R + 1], optional
        Added to the scores by distance: entry d + R, where d is key - query (of positions aligned
        to the bottom right), held between -R and R. Of 16 bits or fp32 (on the CPU also fp64), as
        `alibi_slopes` and `sinks`; a GPU computes with a copy in fp32.
    alibi_slopes : Tensor, [Hq] or [B, Hq], optional
        -slope * |key - query| is added to the scores, of positions aligned to the bottom right.
        Press et al., arXiv:2108.12409.
    softcap : float, optional
        Scores become softcap * tanh(score / softcap) before anything is added to them.
    sinks : Tensor, [Hq], optional
        A logit of each head that takes part in the softmax, but has no value. LSE leaves it out.
    dropout_p : float, default 0
        Part of the weights that is dropped, after the softmax; the others are divided by 1 - p. It
        is held to 2^-16. LSE knows nothing of it.
    dropout_state : Tensor, int64 [2], default drawn from torch's generator of the device
        Decides which weights are dropped (`jitattn.dropout_state`, `jitattn.dropout_mask`).
    qk_norm : L2Norm, optional
        Cosine attention: q and k are scaled to length 1, or come so.
    deterministic : bool
        Let the backward pass give the same bits for dq in every run, in 1.3 to 1.4 times its time.
        (Everything else is reproducible in any case.) `torch.use_deterministic_algorithms(True)`
        means the same, with ``warn_only`` too.
    tile_rows : 16, 64 or 128, optional
        Which of the three kernels of a call on a GPU is taken, by the query rows of a kv head that
        its tile is for; chosen if left out. For tuning: results differ in the last bits only.

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
        An argument breaks a rule; nothing was launched.
    UnsupportedError
        Legal, but no kernel exists: another gear, a GPU older than sm_80, or a gradient that is
        not computed on a GPU: of keys that sequences of `Ragged` share, of a gradient.
    CompileError
        NVRTC is missing or rejected the source.
    LaunchError
        CuPy is missing, the driver refused the kernel, a kernel that is not loaded yet was called
        for during CUDA graph capture (call `jitattn.warmup` before), or lists of blocks that are
        not made yet (make one call before), or the process was forked from one that had used CUDA.
    CacheMissError
        The kernel is not in the cache, and ``JITATTN_NO_COMPILE`` forbids compiling it.

    Notes
    -----
    Gradients, on a GPU: of q, k, v, `bias` (summed over the dimensions in which it is broadcast),
    `relative_bias`, `alibi_slopes`, `sinks` and ``L2Norm(head_scale)``, and through the LSE. The
    backward pass needs 4 bytes for each element of q and 8 for each of its rows and heads, beside
    the gradients; of long fp32 sequences also as much as q, k, v and the gradient of `out`
    (`run/split_fp32.py` says of which); of pages, and of rows that `batch_idx` names, whose
    gradients add up over the sequences that share them, 4 bytes for each element of k and v of
    `max_length` keys a sequence; of more than some 100,000 queries a key, 4 bytes for each element
    of k and v.
    What is saved for it must not be written to before: autograd raises. First derivatives only; the
    CPU path has every order, and forward mode. torch.func's grad, vjp, jacrev and vmap work on
    both.

    Tracers (torch.compile, torch.export, make_fx, torch.jit.trace) and dispatch modes see operators
    of torch.library; meta and fake tensors give results of their kind. Numerics are those of the
    gear inside autocast, too.

    Bitwise reproducible: two runs on the same inputs give the same bits. A NaN in q or k reaches
    the rows that see it; one in v may also reach rows to which it is hidden, as 0 * NaN. Papers:
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
    scores = NO_CHANGES
    tensors_are_none = bias is relative_bias is alibi_slopes is sinks is None
    numbers_are_none = softcap is None and qk_norm is None and dropout_p == 0.0
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
    call = Call(
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
        return call_operator(q, k, v, call)
    is_plain = type(q) is type(k) is type(v) is Tensor or {type(q), type(k), type(v)} <= PLAIN
    if is_plain and not (num_dispatch_modes() or is_tracing()):
        try:
            return run(q, k, v, call)
        except WithoutMemoryError:
            return attention_indirectly(q, k, v, call)
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        return attention_indirectly(q, k, v, call)
    tensors = interop.from_all({"q": q, "k": k, "v": v}, out=out)
    result = run(tensors["q"], tensors["k"], tensors["v"], call._replace(out=tensors.get("out")))
    if not return_lse:
        return interop.to_kind_of(result, q) if out is None else out
    values, lse = result
    return interop.to_kind_of(values, q) if out is None else out, interop.to_kind_of(lse, q)


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
    TypeError
        `attention` has no such argument.
    """
    bound = inspect.signature(attention).bind(q, k, v, **arguments)
    bound.apply_defaults()
    given = bound.arguments
    tensors = interop.from_all({name: given[name] for name in ("q", "k", "v")}, out=given["out"])
    names = ("bias", "relative_bias", "alibi_slopes", "softcap", "sinks")
    more = ("dropout_p", "dropout_state", "qk_norm")
    scores = _scores(tensors["q"], *(given[name] for name in (*names, *more)))
    others = {name: given[name] for name in Call._fields if name != "scores"}
    others["out"] = tensors.get("out")
    return tensors, Call(**others, scores=NO_CHANGES if scores == NO_CHANGES else scores)

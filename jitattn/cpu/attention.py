"""CPU path of attention, chunked over queries and keys, with O(L) memory.

Plain differentiable operations, so autograd gives every order of derivative, and forward mode too.
The softmax is online over key chunks (arXiv:1805.02867); fp16 and bf16 are computed in fp32.

Autograd would save the scores of every chunk, O(L²) in total. So with more than one query chunk,
each is a checkpoint (`torch.utils.checkpoint`, ``use_reentrant=False``): backward recomputes one
chunk at a time and keeps its scores, O(Lkv), only meanwhile. A single query chunk needs no
checkpoint. torch.func transforms do not allow checkpoints: inside them, and wherever else
saved-tensor hooks are disabled, the scores of all chunks are kept.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import torch
from torch.utils.checkpoint import checkpoint

from jitattn.cpu.functions import Chunk, evaluate
from jitattn.cpu.mkl_warmup import mkl_warmup
from jitattn.cpu.rules import Rules
from jitattn.errors import InternalError, InvalidInputError
from jitattn.request.scores import NO_CHANGES, of_sequence, tensors_of
from jitattn.values.autocast import matmul, outside_autocast
from jitattn.values.sequences import Padded, Paged, Ragged
from jitattn.values.write_tracking import guard

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call, Runtime
    from jitattn.request.scores import Scores
    from jitattn.values.masks import Mask
    from jitattn.values.sequences import KvSequences

#: Queries and keys of a chunk: the scores of a chunk take 4 · B · Hq · 128 · 512 bytes.
CHUNK_Q: Final = 128
CHUNK_KV: Final = 512


@outside_autocast
def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    scores: Scores = NO_CHANGES,
    out: Tensor | None = None,
    out_dtype: torch.dtype,
    return_lse: bool,
    chunk_q: int = CHUNK_Q,
    chunk_kv: int = CHUNK_KV,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention on the CPU; the arguments are already validated.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D], any strides
    k : Tensor, [B, Lkv, Hkv, D]
    v : Tensor, [B, Lkv, Hkv, Dv]
    mask : Mask
    scale : float
    scores : Scores
    out : Tensor, [B, Lq, Hq, Dv], optional
        Tensor for the result; no input may require grad then.
    out_dtype : torch.dtype
    return_lse : bool
    chunk_q, chunk_kv : int
        Queries and keys of a chunk.

    Returns
    -------
    out : Tensor, [B, Lq, Hq, Dv], `out_dtype`
        Rows that see nothing are 0, and so are their gradients.
    lse : Tensor, [B, Hq, Lq]
        fp32 (fp64 for fp64 inputs); -inf for such rows. Only if `return_lse`.
    """
    mkl_warmup()
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    # [B, H, L, D] from here on; the upcast is O(L).
    q, k, v = (x.transpose(1, 2).to(compute_dtype) for x in (q, k, v))
    len_q = q.shape[2]
    rules = Rules.of(mask, scores, len_q, k.shape[2], (q.shape[1], k.shape[1]))

    run = partial(_chunk, scale=scale, rules=rules, chunk_kv=chunk_kv, len_q=len_q)
    follows = torch.is_grad_enabled() and _any_requires_grad(q, k, v)
    if len_q > chunk_q and follows and _may_checkpoint():
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    # torch.split, here and below: its backward is one concatenation, that of a slice is full-sized.
    parts = [run(part, k, v, i * chunk_q) for i, part in enumerate(torch.split(q, chunk_q, dim=2))]

    result = torch.cat([part for part, _ in parts], dim=2).transpose(1, 2)
    if out is None:
        out = result.to(out_dtype)
    else:
        out.copy_(result)
    if not return_lse:
        return out
    return out, torch.cat([lse for _, lse in parts], dim=2)


@outside_autocast
def run_cpu(
    q: Tensor, k: Tensor, v: Tensor, runtime: Runtime, call: Call
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a validated call of `attention` on CPU tensors."""
    if call.q_seqs is None and call.kv_seqs is None:
        is_bshd = call.layout == "bshd"
        if not is_bshd:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        target = call.out if call.out is None or is_bshd else call.out.transpose(1, 2)
        computed, lse = _dense(q, k, v, runtime, call, target)
        if call.out is not None:
            computed = call.out
        else:
            computed = (computed if is_bshd else computed.transpose(1, 2)).contiguous()
    else:
        computed, lse = _sequence_by_sequence(q, k, v, runtime, call)
    if computed.requires_grad:
        guard((computed, lse), [("q", q), ("k", k), ("v", v), *_tensors_of(call)])
    return (computed, lse) if call.return_lse else computed


def _tensors_of(call: Call) -> list[tuple[str, Tensor]]:
    """Return the tensors of a call except q, k and v, by their names in messages."""
    found = list(tensors_of(call).items())
    for name, seqs in (("q_seqs", call.q_seqs), ("kv_seqs", call.kv_seqs)):
        given = {} if seqs is None else seqs.tensors()
        found += [(f"{name} ({field})", tensor) for field, tensor in given.items()]
    if call.scores.dropout is not None:
        found.append(("dropout_state", call.scores.dropout.state))
    return found


def _dense(
    q: Tensor, k: Tensor, v: Tensor, runtime: Runtime, call: Call, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    result = attention_cpu(
        q,
        k,
        v,
        mask=call.mask,
        scores=call.scores,
        scale=runtime.scale,
        out=out,
        out_dtype=call.out_dtype or q.dtype,
        return_lse=True,
    )
    if not isinstance(result, tuple):
        raise InternalError("the CPU path returned no LSE")
    return result


def _sequence_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, runtime: Runtime, call: Call
) -> tuple[Tensor, Tensor]:
    """Compute ragged, padded or paged sequences one after another; check index contents."""
    is_flat = isinstance(call.q_seqs, Ragged)
    if call.layout == "bhsd":
        q = q if is_flat else q.transpose(1, 2)
        is_batched = not isinstance(call.kv_seqs, Ragged | Paged)
        k, v = (x.transpose(1, 2) if is_batched else x for x in (k, v))
    # From here on: [B, L, H, D], [total, H, D], or [pages, page_size, H, D].
    q_spans = _spans("q_seqs", call.q_seqs, runtime.batch, q.shape[0 if is_flat else 1])
    pages = call.kv_seqs.block_table.tolist() if isinstance(call.kv_seqs, Paged) else None
    rows = k.shape[0] if isinstance(call.kv_seqs, Ragged) else k.shape[1]
    if isinstance(call.kv_seqs, Paged):
        rows *= call.kv_seqs.block_table.shape[1]
    kv_spans = _spans("kv_seqs", call.kv_seqs, runtime.batch, rows)
    kv_rows = list(range(runtime.batch))
    if isinstance(call.kv_seqs, Padded) and call.kv_seqs.batch_idx is not None:
        kv_rows = call.kv_seqs.batch_idx.tolist()
        for idx, row in enumerate(kv_rows):
            if not 0 <= row < k.shape[0]:
                raise InvalidInputError(
                    f"kv_seqs: sequence {idx} is in row {row}, but there are only {k.shape[0]}"
                )
    out = call.out
    if out is None:
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=call.out_dtype or q.dtype)
    elif call.layout == "bhsd" and not is_flat:
        out = out.transpose(1, 2)
    shape = (q.shape[1], q.shape[0]) if is_flat else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(
        shape, float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )
    for idx, ((q_start, len_q), (kv_start, len_kv)) in enumerate(
        zip(q_spans, kv_spans, strict=True)
    ):
        if not len_q:
            continue
        one_q = (q if is_flat else q[idx])[q_start : q_start + len_q][None]
        if pages is not None:
            one_k, one_v = (_gather(x, pages[idx], kv_start, len_kv)[None] for x in (k, v))
        else:
            is_ragged = isinstance(call.kv_seqs, Ragged)
            one_k, one_v = (
                (x if is_ragged else x[kv_rows[idx]])[kv_start : kv_start + len_kv][None]
                for x in (k, v)
            )
        part, part_lse = _dense(one_q, one_k, one_v, runtime, of_sequence(call, idx), None)
        target = out if is_flat else out[idx]
        target[q_start : q_start + len_q] = part[0]
        lse_target = lse if is_flat else lse[idx]
        lse_target[:, q_start : q_start + len_q] = part_lse[0]
    if call.out is not None:
        return call.out, lse
    if not out.requires_grad and torch.is_grad_enabled() and _any_requires_grad(q, k, v):
        # All sequences are empty: gradients must be 0, not None.
        for x in (q, k, v):
            nothing = (x * 0).nan_to_num().sum()
            out, lse = out + nothing.to(out.dtype), lse + nothing.to(lse.dtype)
    if call.layout == "bhsd" and not is_flat:
        out = out.transpose(1, 2).contiguous()
    return out, lse


def _spans(name: str, seqs: KvSequences, batch: int, rows: int) -> list[tuple[int, int]]:
    """Return (start, length) of every sequence; refuse one that leaves the tensor."""
    if seqs is None:
        return [(0, rows)] * batch
    starts = [0] * batch if seqs.start is None else seqs.start.tolist()
    lengths = seqs.length.tolist()
    for idx, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if start < 0 or length < 0 or start + length > rows:
            raise InvalidInputError(
                f"{name}: sequence {idx} is the rows {start} to {start + length - 1}, but there "
                f"are only {rows}"
            )
    return list(zip(starts, lengths, strict=True))


def _gather(x: Tensor, pages: list[int], start: int, length: int) -> Tensor:
    """Gather keys or values of one sequence, [length, H, D]."""
    page_size, num_pages = x.shape[1], x.shape[0]
    first = start // page_size
    used = pages[first : -(-(start + length) // page_size)] if length else []
    for page in used:
        if not 0 <= page < num_pages:
            raise InvalidInputError(
                f"kv_seqs: the block table names page {page}, but there are only {num_pages}"
            )
    index = torch.tensor(used, dtype=torch.int64, device=x.device)
    return x[index].flatten(0, 1)[start - first * page_size :][:length]


def _may_checkpoint() -> bool:
    return torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined, no-any-return]


def _any_requires_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_q: int,
    *,
    scale: float,
    rules: Rules,
    chunk_kv: int,
    len_q: int,
) -> tuple[Tensor, Tensor]:
    """Return the result [B, Hq, Cq, Dv] and the LSE [B, Hq, Cq] of one chunk of queries.

    The queries of a kv head's whole group are rows of one matrix: r_ names are [B, Hkv, G · Cq, …].
    """
    batch, heads_q, rows, head_dim = q.shape
    heads_kv, len_kv, head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    group = heads_q // heads_kv if heads_kv else 1
    r_q = scale * q.reshape(batch, heads_kv, group * rows, head_dim)

    r_max = r_q.new_full((batch, heads_kv, group * rows, 1), float("-inf"))
    # Sums over no keys: zeros, yet functions of q, k and v, so that blind rows have gradients (0).
    no_scores = matmul(r_q, k[:, :, :0].transpose(2, 3))
    r_sum = no_scores.sum(dim=3, keepdim=True)
    r_out = matmul(no_scores, v[:, :, :0])
    for start, stop in rules.key_ranges(first_q, rows, len_kv):
        if start >= stop:
            continue
        k_chunks = torch.split(k[:, :, start:stop], chunk_kv, dim=2)
        v_chunks = torch.split(v[:, :, start:stop], chunk_kv, dim=2)
        for chunk_idx, (k_chunk, v_chunk) in enumerate(zip(k_chunks, v_chunks, strict=True)):
            first_k = start + chunk_idx * chunk_kv
            scores = matmul(r_q, k_chunk.transpose(2, 3))
            by_head = (batch, heads_q, rows, k_chunk.shape[2])
            if rules.changes_scores:
                scores = rules.change(scores.view(by_head), first_q, first_k).view(scores.shape)
            hidden = rules.hidden(first_q, rows, first_k, first_k + by_head[3], q.device)
            if rules.scores.function is not None:
                here = Chunk(first_q, first_k, len_kv - len_q)
                changed, seen = evaluate(rules.scores.function, scores.view(by_head), here)
                if changed is not None:
                    scores = changed.reshape(scores.shape)
                if seen is not None:
                    hidden = ~seen if hidden is None else hidden | ~seen
            if hidden is not None:
                shape = scores.shape
                scores = scores.view(by_head).masked_fill(hidden, float("-inf")).view(shape)
            # The result does not depend on the maximum, so neither does any derivative.
            new_max = torch.maximum(r_max, scores.detach().amax(dim=3, keepdim=True))
            shift = new_max.masked_fill(new_max == float("-inf"), 0.0)  # rows that saw no key yet
            weights = torch.exp(scores - shift)
            rescale = torch.exp(r_max - shift)
            r_sum = r_sum * rescale + weights.sum(dim=3, keepdim=True)
            if rules.scores.dropout is not None:
                dropped = rules.drop(weights.view(by_head), first_q, first_k)
                weights = dropped.view(weights.shape)
            r_out = r_out * rescale + matmul(weights, v_chunk)
            r_max = new_max

    blind = r_max == float("-inf")  # rows without a visible key: 0, -inf, no gradient
    r_sum = r_sum.masked_fill(blind, 1.0)
    highest = r_max.masked_fill(blind, 0.0)
    lse = (highest + r_sum.log()).masked_fill(blind, float("-inf"))
    if rules.scores.sinks is not None:
        sinks = rules.scores.sinks.to(r_sum.dtype).view(1, heads_kv, group, 1, 1)
        own = sinks.expand(batch, heads_kv, group, rows, 1).reshape(r_sum.shape)
        # From the larger of the sink and the maximum, so that neither weight overflows.
        shift = torch.maximum(highest, own.detach()).masked_fill(blind, 0.0)
        rescale = torch.exp(highest - shift)
        r_out = r_out * rescale
        r_sum = r_sum * rescale + torch.exp(own - shift).masked_fill(blind, 0.0)
    return (
        (r_out / r_sum).reshape(batch, heads_q, rows, head_dim_v),
        lse.reshape(batch, heads_q, rows),
    )

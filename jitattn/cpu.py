"""The CPU path: attention on CPU tensors, chunked over queries and keys, memory O(L).

Plain differentiable operations, so autograd gives every order of derivative, and forward mode too.
The softmax is online over key chunks (arXiv:1805.02867); fp16 and bf16 are computed in fp32.

Left alone, autograd would keep the scores of every chunk, O(L²) in all. So with more than one
query chunk each is a checkpoint (`torch.utils.checkpoint`, ``use_reentrant=False``): its backward
computes the chunk again and keeps the scores of that one chunk, O(Lkv), only while it runs. One
query chunk alone needs none of this. (torch.func.grad and its kin refuse checkpoints, so they work
up to one query chunk; torch.autograd and forward mode work at every length.)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import torch
from torch.utils.checkpoint import checkpoint

from jitattn.masks import Causal

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.masks import Mask

#: Queries and keys of a chunk: the scores of a chunk take 4 · B · Hq · 128 · 512 bytes.
CHUNK_Q: Final = 128
CHUNK_KV: Final = 512


def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
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
    out : Tensor, [B, Lq, Hq, Dv], optional
        Where the result is written; nothing may require grad then.
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
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    # [B, H, L, D] from here on; the upcast is O(L).
    q, k, v = (x.transpose(1, 2).to(compute_dtype) for x in (q, k, v))
    len_q, len_kv = q.shape[2], k.shape[2]
    diagonal = None
    if isinstance(mask, Causal):
        diagonal = len_kv - len_q if mask.align == "bottom_right" else 0

    run = partial(_chunk, scale=scale, diagonal=diagonal, chunk_kv=chunk_kv)
    if len_q > chunk_q and torch.is_grad_enabled() and _any_requires_grad(q, k, v):
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


def _any_requires_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_q: int,
    *,
    scale: float,
    diagonal: int | None,
    chunk_kv: int,
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
    no_scores = r_q @ k[:, :, :0].transpose(2, 3)
    r_sum = no_scores.sum(dim=3, keepdim=True)
    r_out = no_scores @ v[:, :, :0]
    end = len_kv if diagonal is None else max(0, min(len_kv, first_q + rows + diagonal))
    k_chunks = torch.split(k[:, :, :end], chunk_kv, dim=2) if end else ()
    v_chunks = torch.split(v[:, :, :end], chunk_kv, dim=2) if end else ()
    for chunk_idx, (k_chunk, v_chunk) in enumerate(zip(k_chunks, v_chunks, strict=True)):
        first_k, last_k = chunk_idx * chunk_kv, min((chunk_idx + 1) * chunk_kv, end)
        scores = r_q @ k_chunk.transpose(2, 3)
        if diagonal is not None and last_k - 1 > first_q + diagonal:
            hidden = _hidden(first_q + diagonal, rows, first_k, last_k, q.device)
            scores = scores.masked_fill(hidden.repeat(group, 1), float("-inf"))
        # The result does not depend on the maximum, so neither does any derivative.
        new_max = torch.maximum(r_max, scores.detach().amax(dim=3, keepdim=True))
        shift = new_max.masked_fill(new_max == float("-inf"), 0.0)  # rows that saw nothing yet
        weights = torch.exp(scores - shift)
        rescale = torch.exp(r_max - shift)
        r_sum = r_sum * rescale + weights.sum(dim=3, keepdim=True)
        r_out = r_out * rescale + weights @ v_chunk
        r_max = new_max

    blind = r_max == float("-inf")  # rows that see nothing: 0, -inf, no gradient
    r_sum = r_sum.masked_fill(blind, 1.0)
    lse = (r_max.masked_fill(blind, 0.0) + r_sum.log()).masked_fill(blind, float("-inf"))
    return (
        (r_out / r_sum).reshape(batch, heads_q, rows, head_dim_v),
        lse.reshape(batch, heads_q, rows),
    )


def _hidden(diagonal: int, rows: int, first_k: int, last_k: int, device: torch.device) -> Tensor:
    """Return which keys of a chunk the queries may not see, [Cq, Ck]; True = hidden."""
    query_idx = torch.arange(rows, device=device)[:, None]
    key_idx = torch.arange(first_k, last_k, device=device)[None, :]
    return key_idx > query_idx + diagonal

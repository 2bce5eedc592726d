"""Appends to copies of KV caches token by token, then computes attention over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.reference.attention import reference, rows_of
from jitattn.values.masks import Causal, Full
from jitattn.values.sequences import Padded, Paged, Ragged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask
    from jitattn.values.rotary import Rotary


def with_kvcache(
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
    mask: Mask = Causal(),  # noqa: B008 - frozen, without state
    scale: float | None = None,
    layout: str = "bshd",
    dtype: torch.dtype = torch.float64,
    q_seqs: Ragged | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append to copies of the caches token by token, then compute attention over them.

    The arguments are those of `jitattn.attention_with_kvcache`. Rotated values are computed in
    `dtype` and rounded to that of q.

    Returns
    -------
    out, lse : Tensor
        As `reference` returns them.
    k_cache, v_cache : Tensor
        The copies, with the new tokens in them.
    """
    q, k_cache, v_cache = q.clone(), k_cache.clone(), v_cache.clone()
    batch = q.shape[0] if q_seqs is None else q_seqs.batch
    stops = []
    for b in range(batch):
        used = length if isinstance(length, int) else int(length[b])
        if k is None or v is None:
            stops.append(used)
            continue
        # Views [L, H, D] of this sequence's tokens, whatever the layout.
        if q_seqs is not None:
            own_q, own_k, own_v = (x[rows_of(q_seqs, b, 0)] for x in (q, k, v))
        else:
            own_q, own_k, own_v = (
                x[b] if layout == "bshd" else x[b].transpose(0, 1) for x in (q, k, v)
            )
        for t in range(own_k.shape[0]):
            position = used + t
            key = own_k[t] if rotary is None else _turned(own_k[t], position, rotary, dtype)
            for cache, value in ((k_cache, key), (v_cache, own_v[t])):
                if block_table is not None:
                    page = int(block_table[b, position // cache.shape[1]])
                    cache[page, position % cache.shape[1]] = value
                else:
                    row = cache[b if batch_idx is None else int(batch_idx[b])]
                    (row if layout == "bshd" else row.transpose(0, 1))[position] = value
        if rotary is not None:
            for t in range(own_q.shape[0]):
                position = used if isinstance(mask, Full) else used + t
                own_q[t] = _turned(own_q[t], position, rotary, dtype)
        stops.append(used + own_k.shape[0])
    starts = [0] * batch if left_pad is None else left_pad.tolist()
    ends, first = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in (stops, starts))
    lengths = ends - first
    kv_seqs = (
        Padded(lengths, first, batch_idx=batch_idx if batch_idx is None else batch_idx.cpu())
        if block_table is None
        else Paged(block_table.cpu(), lengths, start=first)
    )
    out, lse = reference(
        q,
        k_cache,
        v_cache,
        mask=mask,
        scale=scale,
        layout=layout,
        dtype=dtype,
        return_lse=True,
        q_seqs=q_seqs,
        kv_seqs=kv_seqs,
    )
    return out, lse, k_cache, v_cache


def _turned(x: Tensor, position: int, rotary: Rotary, dtype: torch.dtype) -> Tensor:
    """Apply rotary embedding to one token's heads [H, D], pair by pair."""
    result = x.clone()
    half = rotary.cos.shape[1]
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + half)
        cos, sin = (table[position, pair].to(dtype) for table in (rotary.cos, rotary.sin))
        first, second = x[:, a].to(dtype), x[:, b].to(dtype)
        result[:, a] = (first * cos - second * sin).to(x.dtype)
        result[:, b] = (second * cos + first * sin).to(x.dtype)
    return result

"""THE oracle: attention in plain PyTorch, slow and obvious.

Every test, the CPU path and the benchmarks are compared with this one function. It shares no code
with anything that it judges (but a matrix product that autocast does not reach): the score matrix
is materialised, the mask is an explicit boolean matrix, kv heads are repeated. Memory is
O(Lq · Lkv).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from jitattn.cpu.vector_math import settle_vml
from jitattn.errors import InvalidInputError
from jitattn.values.autocast import matmul, outside_autocast
from jitattn.values.masks import (
    BlockSparse,
    Both,
    Causal,
    Dense,
    Full,
    KeyPadding,
    LocalStride,
    PerHead,
    Window,
    parts_of,
)
from jitattn.values.sequences import Padded, Paged, Ragged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask, Rule
    from jitattn.values.norm import L2Norm
    from jitattn.values.rotary import Rotary
    from jitattn.values.sequences import KvSequences, QSequences


def visible(
    mask: Mask, len_q: int, len_kv: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Return what a rule of positions lets through, [Lq, Lkv]; True = attend."""
    query_idx = torch.arange(len_q, device=device)[:, None]
    key_idx = torch.arange(len_kv, device=device)[None, :]
    if isinstance(mask, Full):
        return torch.ones(len_q, len_kv, dtype=torch.bool, device=device)
    if isinstance(mask, Causal):
        if mask.align == "bottom_right":
            return key_idx <= query_idx + len_kv - len_q
        return key_idx <= query_idx
    if isinstance(mask, Window):
        position = query_idx + len_kv - len_q
        attend = torch.ones(len_q, len_kv, dtype=torch.bool, device=device)
        if mask.left is not None and not (mask.full_on_decode and len_q == 1):
            attend = (key_idx >= position - mask.left) | (key_idx < mask.keep_first)
        if mask.right is not None:
            attend = attend & (key_idx <= position + mask.right)
        return attend
    raise InvalidInputError(f"mask={mask!r}: the reference knows no such rule")


def pattern(
    mask: LocalStride,
    heads_q: int,
    heads_kv: int,
    len_q: int,
    len_kv: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return what a local + stride pattern lets through, [Hq, Lq, Lkv]; True = attend."""
    position = torch.arange(len_q, device=device)[:, None] + len_kv - len_q
    key_idx = torch.arange(len_kv, device=device)[None, :]
    i, j = position.div(mask.block_size, rounding_mode="floor"), key_idx // mask.block_size
    heads = []
    for head in range(heads_q):
        kv_head = head // (heads_q // heads_kv)
        if mask.causal:
            shift = kv_head * mask.step(heads_q) + mask.head_offset
            on_stride = (j + shift) % mask.vert_stride == 0
            is_dense = kv_head >= heads_kv - mask.num_dense_heads
            seen = (i - j < mask.local[0]) | on_stride
            seen = torch.ones_like(seen) if is_dense else seen
            heads.append(seen & (key_idx <= position))
        else:
            left, right = mask.local
            distance = (i - j - left + 1).clamp(min=0) + (j - i - right + 1).clamp(min=0)
            heads.append((distance % mask.vert_stride == 0) & (position >= 0))
    return torch.stack(heads) if heads else key_idx.new_ones(0, len_q, len_kv, dtype=torch.bool)


def block_pattern(
    mask: BlockSparse,
    heads_q: int,
    len_q: int,
    len_kv: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return what a pattern of blocks lets through, [Hq, Lq, Lkv]; True = attend."""
    first = len_kv - len_q if mask.first_row is None else mask.first_row
    blocks = mask.pattern.to(device)
    blocks = blocks.expand(1, *blocks.shape) if blocks.dim() == 2 else blocks
    elements = blocks.repeat_interleave(mask.block_size, 1).repeat_interleave(mask.block_size, 2)
    attend = torch.zeros(len(blocks), len_q, len_kv, dtype=torch.bool, device=device)
    for query in range(len_q):
        position = first + query
        if 0 <= position < elements.shape[1]:
            row = elements[:, position, :len_kv]
            if mask.causal:
                row = row[:, : position + 1]
            attend[:, query, : row.shape[1]] = row
    return attend.repeat_interleave(heads_q // len(blocks), 0)


def _rule(
    rule: Rule,
    heads_q: int,
    heads_kv: int,
    len_q: int,
    len_kv: int,
    device: torch.device | str | None,
) -> Tensor:
    """Return what a rule of positions lets through, [Hq or 1, Lq, Lkv]."""
    if isinstance(rule, LocalStride):
        return pattern(rule, heads_q, heads_kv, len_q, len_kv, device=device)
    if isinstance(rule, BlockSparse):
        return block_pattern(rule, heads_q, len_q, len_kv, device=device)
    if isinstance(rule, PerHead):
        rows = []
        for head in range(heads_q):
            part = rule.rules[head * len(rule.rules) // heads_q]
            seen = _rule(part, heads_q, heads_kv, len_q, len_kv, device)
            rows.append(seen[head if len(seen) > 1 else 0])
        empty = (0, len_q, len_kv)
        return torch.stack(rows) if rows else torch.ones(empty, dtype=torch.bool, device=device)
    return visible(rule, len_q, len_kv, device=device)[None]


def attended(
    mask: Mask,
    batch: int,
    heads_q: int,
    heads_kv: int,
    len_q: int,
    len_kv: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the whole mask, broadcastable to [B, Hq, Lq, Lkv]; True = attend."""
    parts = parts_of(mask)
    attend = _rule(parts.rule, heads_q, heads_kv, len_q, len_kv, device)
    attend = attend.expand(batch, *attend.shape)
    if parts.key_padding is not None:
        attend = attend & parts.key_padding.keep[:, None, None, :len_kv].to(device)
    if parts.dense is not None:
        keep = parts.dense.keep.to(device)[..., :len_kv]
        attend = attend & (keep if keep.shape[2] == 1 else keep[:, :, :len_q])
    return attend


class Scores(NamedTuple):
    """What is added to scores and done with them, as `jitattn.attention` takes it."""

    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_state: Tensor | None = None
    qk_norm: L2Norm | None = None
    first_batch: int = 0  #: of the sequences that these are of, among all

    def unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scale q [B, Hq, Lq, D] and k to length 1, if asked for."""
        if self.qk_norm is None or not self.qk_norm.normalize:
            return q, k
        slices = []
        for x in (q, k):
            parts = []
            for part in torch.split(x, x.shape[3] // self.qk_norm.groups, dim=3):
                square = (part * part).sum(dim=3, keepdim=True)
                length = torch.where(square < 1e-24, 1.0, square).sqrt()
                parts.append(torch.where(square < 1e-24, 0.0, part / length))
            slices.append(torch.cat(parts, dim=3))
        if self.qk_norm.head_scale is not None:
            slices[0] = slices[0] * self.qk_norm.head_scale.to(q.dtype)[:, None, None]
        return slices[0], slices[1]

    def drop(self, weights: Tensor) -> Tensor:
        """Drop weights [B, Hq, Lq, Lkv], one number each."""
        threshold = min(65535, round(self.dropout_p * 65536))
        if not threshold or self.dropout_state is None:
            return weights
        heads = weights.shape[1]
        seed, offset = (int(x) % 2**64 for x in self.dropout_state)
        sizes = (torch.arange(n, device=weights.device) for n in weights.shape)
        b, h, i, j = torch.cartesian_prod(*sizes).reshape(-1, 4).T
        stream = (b + self.first_batch) * heads + h
        x = [j // 32 * 4 + j % 8 // 2, i, stream, offset % 2**32 + 0 * j]
        moved = offset // 2**32
        key = [(seed + moved) % 2**32, (seed // 2**32 + moved * 0x85EBCA6B) % 2**32]
        for _ in range(7):
            products = (x[0] * 0xD2511F53, x[2] * 0xCD9E8D57)
            high = [(product >> 32) % 2**32 for product in products]
            low = [product % 2**32 for product in products]
            x = [high[1] ^ x[1] ^ key[0], low[1], high[0] ^ x[3] ^ key[1], low[0]]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        word = torch.stack(x, dim=1).gather(1, (j % 32 // 8)[:, None])[:, 0]
        number = torch.where(j % 2 == 0, word % 2**16, word // 2**16)
        stays = (number >= threshold).reshape(weights.shape)
        return weights * stays / (1 - threshold / 65536)

    def apply(self, scores: Tensor) -> Tensor:
        """Change scores [B, Hq, Lq, Lkv], which are scaled already."""
        _, heads, len_q, len_kv = scores.shape
        device, dtype = scores.device, scores.dtype
        query_idx = torch.arange(len_q, device=device)[:, None] + len_kv - len_q
        distance = torch.arange(len_kv, device=device)[None, :] - query_idx  # [Lq, Lkv]
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes.to(dtype).expand(scores.shape[0], heads)
            scores = scores - slopes[..., None, None] * distance.abs()
        if self.relative_bias is not None:
            reach = self.relative_bias.shape[1] // 2
            column = distance.clamp(-reach, reach) + reach
            scores = scores + self.relative_bias.to(dtype)[:, column]
        if self.bias is not None:
            bias = self.bias.to(dtype)[..., :len_kv]
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, :len_q])
        return scores

    def of_sequence(self, b: int) -> Scores:
        """Return those of one sequence of the batch."""
        bias, slopes = self.bias, self.alibi_slopes
        if bias is not None and bias.shape[0] > 1:
            bias = bias[b : b + 1]
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]
        return self._replace(bias=bias, alibi_slopes=slopes, first_batch=b)


@outside_autocast
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = Full(),  # noqa: B008 - frozen, without state
    scale: float | None = None,
    layout: str = "bshd",
    dtype: torch.dtype = torch.float64,
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
) -> Any:  # noqa: ANN401 - Tensor, or (Tensor, Tensor) with return_lse
    """Compute exact scaled dot-product attention the obvious way.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D] ([B, Hq, Lq, D] with ``layout="bhsd"``)
        Any floating dtype, device and strides; it is upcast to `dtype` first.
    k : Tensor, [B, Lkv, Hkv, D]
        Hq % Hkv == 0; query head h reads kv head h // (Hq / Hkv).
    v : Tensor, [B, Lkv, Hkv, Dv]
    mask : Mask, default Full()
    scale : float, default 1/sqrt(D), and 8 with qk_norm
    layout : "bshd" or "bhsd"
    dtype : torch.dtype, default torch.float64
        What everything is computed in, and the dtype of the results.
    return_lse : bool, default False
    q_seqs, kv_seqs : optional
        Where the sequences lie, as in `jitattn.attention`. Rows that belong to none are 0, with an
        LSE of -inf.
    bias, relative_bias, alibi_slopes, softcap, sinks, dropout_p, dropout_state, qk_norm : optional
        As in `jitattn.attention`.

    Returns
    -------
    out : Tensor, [B, Lq, Hq, Dv] in the layout of q
        Rows that may attend to nothing are 0, and their gradients are 0.
    lse : Tensor, [B, Hq, Lq]
        Natural logarithm of the sum of exponentials, without sinks; -inf for such rows. Only if
        `return_lse`.

    Notes
    -----
    Differentiable. A length, batch or head count of 0 works. Deterministic on the CPU.

    Examples
    --------
    >>> import torch
    >>> q = k = v = torch.ones(1, 2, 1, 4)
    >>> reference(q, k, v).shape
    torch.Size([1, 2, 1, 4])
    """
    if layout not in ("bshd", "bhsd"):
        raise InvalidInputError(f"layout={layout!r}: the layout is 'bshd' or 'bhsd'")
    settle_vml()
    # numpy's numbers would take tensors for arrays of theirs.
    scale, softcap = (None if x is None else float(x) for x in (scale, softcap))
    changes = Scores(
        bias, relative_bias, alibi_slopes, softcap, sinks, float(dropout_p), dropout_state, qk_norm
    )
    if q_seqs is not None or kv_seqs is not None:
        out, lse = _one_by_one(q, k, v, mask, scale, layout, dtype, q_seqs, kv_seqs, changes)
    else:
        out, lse = _dense(q, k, v, mask, scale, layout, dtype, changes)
    return (out, lse) if return_lse else out


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None,
    layout: str,
    dtype: torch.dtype,
    changes: Scores,
) -> tuple[Tensor, Tensor]:
    # Everything below is [B, H, L, D].
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    heads_q, heads_kv = q.shape[1], k.shape[1]
    if heads_kv > 0:
        k = k.repeat_interleave(heads_q // heads_kv, dim=1)
        v = v.repeat_interleave(heads_q // heads_kv, dim=1)
    q, k = changes.unit(q, k)
    if scale is None:
        scale = q.shape[3] ** -0.5 if changes.qk_norm is None else 8.0

    attend = attended(mask, q.shape[0], heads_q, heads_kv, q.shape[2], k.shape[2], device=q.device)
    scores = changes.apply(scale * matmul(q, k.transpose(2, 3)))  # [B, Hq, Lq, Lkv]
    scores = scores.masked_fill(~attend, float("-inf"))
    sees_any = (scores != float("-inf")).any(dim=3)  # [B, Hq, Lq]; a bias may hide as well
    # A row of nothing but -inf has no softmax, and its gradient is NaN: give it harmless scores
    # here, and take its weights and its LSE away again below.
    scores = scores.masked_fill(~sees_any[..., None], 0.0)
    lse = torch.logsumexp(scores, dim=3)
    if changes.sinks is not None:  # one more column, which has no value
        sink = changes.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=3)
    weights = changes.drop(torch.softmax(scores, dim=3)[..., : k.shape[2]])
    out = matmul(weights.masked_fill(~sees_any[..., None], 0.0), v)  # [B, Hq, Lq, Dv]
    if layout == "bshd":
        out = out.transpose(1, 2)
    return out, lse.masked_fill(~sees_any, float("-inf"))


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None,
    layout: str,
    dtype: torch.dtype,
    q_seqs: QSequences,
    kv_seqs: KvSequences,
    changes: Scores,
) -> tuple[Tensor, Tensor]:
    """Cut every sequence out, compute it alone, and put it where it belongs."""
    is_flat = isinstance(q_seqs, Ragged)
    if layout == "bhsd" and not is_flat:
        q = q.transpose(1, 2)
    if layout == "bhsd" and (kv_seqs is None or isinstance(kv_seqs, Padded)):
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    batch = q.shape[0] if q_seqs is None else q_seqs.batch
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=dtype, device=q.device)
    heads, rows = q.shape[-2], q.shape[-3]
    lse = torch.full(
        (heads, rows) if is_flat else (batch, heads, rows),
        float("-inf"),
        dtype=dtype,
        device=q.device,
    )
    for b in range(batch):
        where = _rows_of(q_seqs, b, rows)
        own_q = q[where] if is_flat else q[b, where]
        own_k, own_v = (_keys_of(kv_seqs, x, b) for x in (k, v))
        own_out, own_lse = _dense(
            own_q[None],
            own_k[None],
            own_v[None],
            of_sequence(mask, b),
            scale,
            "bshd",
            dtype,
            changes.of_sequence(b),
        )
        if is_flat:
            out[where], lse[:, where] = own_out[0], own_lse[0]
        else:
            out[b, where], lse[b][:, where] = own_out[0], own_lse[0]
    if layout == "bhsd" and not is_flat:
        out = out.transpose(1, 2)
    return out, lse


def of_sequence(mask: Mask, b: int) -> Mask:
    """Return the mask of one sequence of the batch."""
    parts = parts_of(mask)
    padding, dense = parts.key_padding, parts.dense
    if padding is not None:
        padding = KeyPadding(padding.keep[b : b + 1])
    if dense is not None and dense.keep.shape[0] > 1:
        dense = Dense(dense.keep[b : b + 1])
    return Both(parts.rule, padding, dense)


def _rows_of(seqs: KvSequences, b: int, rows: int) -> slice:
    if seqs is None:
        return slice(0, rows)
    start = 0 if seqs.start is None else int(seqs.start[b])
    return slice(start, start + int(seqs.length[b]))


def _keys_of(seqs: KvSequences, x: Tensor, b: int) -> Tensor:
    if isinstance(seqs, Paged):
        page_size, own = x.shape[1], _rows_of(seqs, b, 0)
        rows = [
            x[int(seqs.block_table[b, t // page_size]), t % page_size]
            for t in range(own.start, own.stop)
        ]
        return torch.stack(rows) if rows else x[:0, 0]
    if isinstance(seqs, Ragged):
        return x[_rows_of(seqs, b, x.shape[0])]
    row = b if seqs is None or seqs.batch_idx is None else int(seqs.batch_idx[b])
    return x[row, _rows_of(seqs, b, x.shape[1])]


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
    """Append to copies of the caches token by token, then compute attention the obvious way.

    The arguments are those of `jitattn.attention_with_kvcache`. Turned values are computed in
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
            own_q, own_k, own_v = (x[_rows_of(q_seqs, b, 0)] for x in (q, k, v))
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
    """Turn one token's heads [H, D], pair by pair."""
    result = x.clone()
    half = rotary.cos.shape[1]
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + half)
        cos, sin = (table[position, pair].to(dtype) for table in (rotary.cos, rotary.sin))
        first, second = x[:, a].to(dtype), x[:, b].to(dtype)
        result[:, a] = (first * cos - second * sin).to(x.dtype)
        result[:, b] = (second * cos + first * sin).to(x.dtype)
    return result

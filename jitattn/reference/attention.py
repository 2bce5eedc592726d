"""Computes attention on whole score matrices, one sequence after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.cpu.mkl_warmup import mkl_warmup
from jitattn.errors import InvalidInputError
from jitattn.reference.masks import attended, of_sequence
from jitattn.reference.scores import Scores
from jitattn.values.autocast import matmul, outside_autocast
from jitattn.values.masks import Full, parts_of
from jitattn.values.sequences import Padded, Paged, Ragged

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import Mask
    from jitattn.values.norm import L2Norm
    from jitattn.values.sequences import KvSequences, QSequences


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
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None = None,
    q_offset: QOffset | None = None,
) -> Any:  # noqa: ANN401 - Tensor, or (Tensor, Tensor) with return_lse
    """Compute exact scaled dot-product attention on whole score matrices.

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
        Dtype of the computation and of the results.
    return_lse : bool, default False
    q_seqs, kv_seqs : optional
        Layout of the sequences, as in `jitattn.attention`. Rows that belong to no sequence are 0,
        with an LSE of -inf.
    bias, relative_bias, alibi_slopes, softcap, sinks, dropout_p, dropout_state, qk_norm : optional
    score_mod, q_offset : optional
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
    mkl_warmup()
    # A numpy scalar times a tensor gives an array.
    scale, softcap = (None if x is None else float(x) for x in (scale, softcap))
    changes = Scores(
        bias,
        relative_bias,
        alibi_slopes,
        softcap,
        sinks,
        float(dropout_p),
        dropout_state,
        qk_norm,
        score_mod,
        parts_of(mask).function,
        q_offset=q_offset,
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

    offsets = changes.offsets(q.shape[0], k.shape[2] - q.shape[2])
    attend = attended(
        mask, q.shape[0], heads_q, heads_kv, q.shape[2], k.shape[2], offsets, device=q.device
    )
    scores = changes.apply(scale * matmul(q, k.transpose(2, 3)))  # [B, Hq, Lq, Lkv]
    scores = changes.through_functions(scores).masked_fill(~attend, float("-inf"))
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
    """Compute every sequence alone and write its rows to the output."""
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
        where = rows_of(q_seqs, b, rows)
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


def rows_of(seqs: KvSequences, b: int, rows: int) -> slice:
    """Return the rows that one sequence occupies; all `rows` of the tensor if none are given."""
    if seqs is None:
        return slice(0, rows)
    start = 0 if seqs.start is None else int(seqs.start[b])
    return slice(start, start + int(seqs.length[b]))


def _keys_of(seqs: KvSequences, x: Tensor, b: int) -> Tensor:
    """Gather the keys or values of one sequence, [L, H, D]."""
    if isinstance(seqs, Paged):
        page_size, own = x.shape[1], rows_of(seqs, b, 0)
        rows = [
            x[int(seqs.block_table[b, t // page_size]), t % page_size]
            for t in range(own.start, own.stop)
        ]
        return torch.stack(rows) if rows else x[:0, 0]
    if isinstance(seqs, Ragged):
        return x[rows_of(seqs, b, x.shape[0])]
    row = b if seqs is None or seqs.batch_idx is None else int(seqs.batch_idx[b])
    return x[row, rows_of(seqs, b, x.shape[1])]

"""THE oracle: attention in plain PyTorch, slow and obvious.

Every test, the CPU path and the benchmarks are compared with this one function. It shares no code
with anything that it judges: the score matrix is materialised, the mask is an explicit boolean
matrix, kv heads are repeated. Memory is O(Lq · Lkv).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

from jitattn.errors import InvalidInputError
from jitattn.masks import Causal, Full

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.masks import Mask


def visible(
    mask: Mask, len_q: int, len_kv: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Return the mask as a boolean matrix [Lq, Lkv]; True = attend."""
    query_idx = torch.arange(len_q, device=device)[:, None]
    key_idx = torch.arange(len_kv, device=device)[None, :]
    if isinstance(mask, Full):
        return torch.ones(len_q, len_kv, dtype=torch.bool, device=device)
    if isinstance(mask, Causal):
        if mask.align == "bottom_right":
            return key_idx <= query_idx + len_kv - len_q
        return key_idx <= query_idx
    raise InvalidInputError(f"mask={mask!r}: the reference knows Full() and Causal(...) only")


@overload
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = ...,
    scale: float | None = ...,
    layout: str = ...,
    dtype: torch.dtype = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = ...,
    scale: float | None = ...,
    layout: str = ...,
    dtype: torch.dtype = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute exact scaled dot-product attention the obvious way.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D] ([B, Hq, Lq, D] with ``layout="bhsd"``)
        Any floating dtype, device and strides; it is upcast to `dtype` first.
    k : Tensor, [B, Lkv, Hkv, D]
        Hq % Hkv == 0; query head h reads kv head h // (Hq / Hkv).
    v : Tensor, [B, Lkv, Hkv, Dv]
    mask : Mask, default Full()
    scale : float, default 1/sqrt(D)
    layout : "bshd" or "bhsd"
    dtype : torch.dtype, default torch.float64
        What everything is computed in, and the dtype of the results.
    return_lse : bool, default False

    Returns
    -------
    out : Tensor, [B, Lq, Hq, Dv] in the layout of q
        Rows that may attend to nothing are 0, and their gradients are 0.
    lse : Tensor, [B, Hq, Lq]
        Natural logarithm of the sum of exponentials; -inf for such rows. Only if `return_lse`.

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
    # Everything below is [B, H, L, D].
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    heads_q, heads_kv = q.shape[1], k.shape[1]
    if heads_kv > 0:
        k = k.repeat_interleave(heads_q // heads_kv, dim=1)
        v = v.repeat_interleave(heads_q // heads_kv, dim=1)
    if scale is None:
        scale = q.shape[3] ** -0.5

    attend = visible(mask, q.shape[2], k.shape[2], device=q.device)
    sees_any = attend.any(dim=1)  # [Lq]
    scores = scale * (q @ k.transpose(2, 3))  # [B, Hq, Lq, Lkv]
    scores = scores.masked_fill(~attend, float("-inf"))
    # A row of nothing but -inf has no softmax, and its gradient is NaN: give it harmless scores
    # here, and take its weights and its LSE away again below.
    scores = scores.masked_fill(~sees_any[:, None], 0.0)
    weights = torch.softmax(scores, dim=3).masked_fill(~sees_any[:, None], 0.0)
    out = weights @ v  # [B, Hq, Lq, Dv]
    if layout == "bshd":
        out = out.transpose(1, 2)
    if not return_lse:
        return out
    lse = torch.logsumexp(scores, dim=3).masked_fill(~sees_any, float("-inf"))
    return out, lse

"""Dense fp64 reference of FlashAttention's documented semantics, for one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

H, HKV, D = 4, 2, 16


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    keep_first: int = 0,
    force: bool = False,
    slopes: Tensor | None = None,
    stays: Tensor | None = None,
    dropout_p: float = 0.0,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out [Lq, H, D], lse [H, Lq]) of q [Lq, H, D], k and v [Lkv, Hkv, D].

    `stays` [H, Lq, Lkv] is the dropout mask, `longest` the largest Lkv of the call.
    """
    len_q, len_kv, device = len(q), len(k), q.device
    left, right = window
    if causal:
        right = 0
    bound = len_kv if longest is None else longest
    left, right = (-1 if reach >= bound else reach for reach in (left, right))
    if force and len_q == 1 and left >= 0:
        left = len_kv
    i = torch.arange(len_q, device=device)[:, None] + len_kv - len_q
    j = torch.arange(len_kv, device=device)[None, :]
    seen = torch.ones(len_q, len_kv, dtype=torch.bool, device=device)
    if right >= 0:
        seen &= j <= i + right
    if left >= 0:
        seen &= (j >= i - left) | (j < keep_first)
    group = q.shape[1] // k.shape[1]
    wide_q = q.double().transpose(0, 1)
    wide_k, wide_v = (x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    scores = wide_q @ wide_k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * (i - j).abs()
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, 2).nan_to_num(0.0)
    if stays is not None:
        weights = weights * stays / (1.0 - dropout_p)
    lse = torch.logsumexp(scores, 2)
    lse = lse.masked_fill(torch.isneginf(lse), float("inf"))
    return (weights @ wide_v).transpose(0, 1), lse


def turned(x: Tensor, places: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x [L, H, D] in fp64: row i by the tables' row places[i]."""
    own_cos, own_sin = (table.double()[places.to(table.device)][:, None] for table in (cos, sin))
    count = cos.shape[1]
    result = x.detach().double().clone()
    columns = torch.arange(2 * count, device=x.device)
    first, second = (
        (columns[0::2], columns[1::2]) if interleaved else (columns[:count], columns[count:])
    )
    a, b = x.detach().double()[..., first], x.detach().double()[..., second]
    result[..., first] = a * own_cos - b * own_sin
    result[..., second] = b * own_cos + a * own_sin
    return result


def sequences(lengths: tuple[int, ...], heads: int, seed: int) -> list[Tensor]:
    """Make a tensor [L, heads, D] for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, heads, D, generator=generator) for length in lengths]


#: Arguments of the functions, and the same for `dense`.
CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "full": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (5, 3)}, {"window": (5, 3)}),
    "left only": ({"window_size": (5, -1)}, {"window": (5, -1)}),
    "right only": ({"window_size": (-1, 3)}, {"window": (-1, 3)}),
    "causal ignores the right": (
        {"causal": True, "window_size": (6, 6)},
        {"causal": True, "window": (6, 6)},
    ),
    "first keys": (
        {"causal": True, "window_size": (6, 0), "keep_first": 3},
        {"causal": True, "window": (6, 0), "keep_first": 3},
    ),
    "first keys without a window": (
        {"causal": True, "keep_first": 3},
        {"causal": True, "keep_first": 3},
    ),
    "decode": (
        {"causal": True, "window_size": (6, 0), "keep_first": 3, "force_fa_decode": True},
        {"causal": True, "window": (6, 0), "keep_first": 3, "force": True},
    ),
    "scale and softcap": (
        {"softmax_scale": 0.5, "softcap": 1.5, "causal": True},
        {"scale": 0.5, "softcap": 1.5, "causal": True},
    ),
}

"""Score and mask functions, and exact attention with them by torch.vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jitattn.values.pairs import over_pairs

#: A pair of functions (score, mask), either None, for a device, B, Hq, Lq and Lkv.
Make = Callable[[str, int, int, int, int], tuple[Any, Any]]
NEGATIVE_INFINITY = -float("inf")


def _drawn(device: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device)


def _documents(device: str, batch: int, length: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, count, (batch, length), generator=generator).sort().values.to(device)


def _causal(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    return None, lambda b, h, q, k: q >= k


def _window(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    return None, lambda b, h, q, k: (q >= k) & (q - k <= 20)


def _prefix(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    lengths = torch.arange(5, 5 + b, device=device)
    return None, lambda b, h, q, k: (k < lengths[b]) | (q >= k)


def _document(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    ids = _documents(device, b, max(q, k))
    return None, lambda b, h, q, k: (ids[b, q] == ids[b][k]) & (q >= k)


def _alibi(device: str, b: int, heads: int, q: int, k: int) -> tuple[Any, Any]:
    return lambda s, b, h, q, k: s + (k - q) * torch.exp2(-((h + 1) * 8.0 / heads)), None


def _softcap(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    return lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0), None


def _relative(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    return lambda s, b, h, q, k: s + (q - k) * 0.05, None


def _table(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    table = _drawn(device, h, 2 * max(q, k) - 1)
    middle = max(q, k) - 1
    return lambda s, b, h, q, k: s * 0.5 + table[h, k - q + middle], None


def _absolute(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    bias = _drawn(device, b, h, q, k).to(torch.bfloat16)
    return lambda s, b, h, q, k: s + bias[b, h, q, k], None


def _natten(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    width, kernel = 10, 5

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        q_x, q_y, k_x, k_y = q // width, q % width, k // width, k % width
        x = q_x.clamp(kernel // 2, 8 - kernel // 2)
        y = q_y.clamp(kernel // 2, (width - 1) - kernel // 2)
        return ((x - k_x).abs() <= kernel // 2) & ((y - k_y).abs() <= kernel // 2)

    return None, mask


def _dilated(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    return None, lambda b, h, q, k: ((q - k).abs() % 3 == 0) & ((q - k).abs() < 40)


def _checkerboard(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        s = torch.where(torch.abs(k - q) % 2 == 1, s * 0.5, s)
        return torch.where(torch.abs(k - q) % 2 == 0, s * 2.0, s)

    return score, None


def _by_head(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    kinds = torch.arange(h, device=device) % 3

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        moved = torch.where(kinds[h] == 0, s + 0.1 * (k - q), s)
        return torch.where(kinds[h] == 1, torch.sigmoid(s) * 3, moved)

    return score, lambda b, h, q, k: (kinds[h] != 2) | (q >= k)


def _hidden_by_score(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    return (
        lambda s, b, h, q, k: torch.where((q >= k) & (q % 7 != 3), s * s.abs(), NEGATIVE_INFINITY),
        None,
    )


def _negative_divisors(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        d = q - k
        trunc = torch.div(d, 5, rounding_mode="trunc")
        return s + 0.01 * (d // -7) + 0.02 * (d % -7) - 0.03 * trunc + 0.01 * torch.fmod(d, 4)

    return score, None


def _functions(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        x = torch.exp(-s.abs()) + torch.log(s * s + 1.0) - torch.sqrt(s * s + 0.5)
        x = x + torch.sin(s) * torch.cos(s) + torch.rsqrt(s.square() + 1) + torch.erf(s)
        return x + torch.maximum(s, 0.1 * s) + s.clamp(-1.0, 1.0) + s**3 * 0.01 + torch.atan(s)

    return score, None


def _chained(device: str, b: int, h: int, q: int, k: int) -> tuple[Any, Any]:
    ids = _documents(device, b, max(q, k))
    weights = _drawn(device, 3, h).half()
    return lambda s, b, h, q, k: s * weights[ids[b, q]][h] + weights[ids[b, k], h] * 2, None


FUNCTIONS: dict[str, Make] = {
    "causal": _causal, "window": _window, "prefix": _prefix, "document": _document,
    "alibi": _alibi, "softcap": _softcap, "relative": _relative, "table": _table,
    "absolute": _absolute, "natten": _natten, "dilated": _dilated, "checkerboard": _checkerboard,
    "by_head": _by_head, "hidden_by_score": _hidden_by_score,
    "negative_divisors": _negative_divisors, "functions": _functions, "chained": _chained,
}  # fmt: skip


def attend_exactly(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Any, mask_mod: Any
) -> tuple[Tensor, Tensor]:
    """Return out and LSE of [B, L, H, D]; rows that see nothing are 0 and -inf."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * q.shape[-1] ** -0.5
    sizes = tuple(scores.shape)
    if score_mod is not None:
        scores = over_pairs(score_mod, scores, sizes, q.device).to(scores.dtype)
    if mask_mod is not None:
        visible = over_pairs(mask_mod, None, sizes, q.device).expand(sizes)
        scores = scores.masked_fill(~visible, NEGATIVE_INFINITY)
    blind = (scores == NEGATIVE_INFINITY).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(blind, 0.0), -1)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    return out, lse.masked_fill(blind[..., 0], NEGATIVE_INFINITY)

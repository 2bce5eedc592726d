"""Dropout by global positions: the bits of `attention`, drawn by a traced function of the pair.

Kernels count rows and heads from those of a call, so a shard's own dropout would draw others. With
m the kept weights, softmax(s) m v is exp(lse_m - lse) times the attention to the kept keys alone,
whose LSE is lse_m: two calls, the second with m as a mask, which differentiate as every call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from jitattn.values.dropout import philox
from jitattn.values.masks import MaskMod

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 0xFFFFFFFF
#: As `values/dropout.py`.
_KEY_FACTOR = 0x85EBCA6B


class Dropped(NamedTuple):
    """Dropout of a call."""

    kept: MaskMod  #: of the pairs, by row, key and query head of the whole
    scale: float  #: of the weights that are kept


def dropped(threshold: int, state: Tensor, heads: int) -> Dropped:
    """Return the dropout of a call of so many query heads; see `cuda_src/jitattn/attention`."""
    draw, word_of, factor = philox, _WORD, _KEY_FACTOR

    def kept(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401 - symbols
        seed, offset = state[0], state[1]
        high = (offset >> 32) & word_of
        key = (seed + high) & word_of, ((seed >> 32) + high * factor) & word_of
        wide = offset * 0
        x = wide + kv_idx // 32 * 4 + kv_idx % 8 // 2
        words = draw((x, wide + q_idx, wide + b * heads + h, offset & word_of), key)
        place = kv_idx % 32 // 8
        word = words[3]
        for idx in (2, 1, 0):
            word = torch.where(place == idx, words[idx], word)
        return ((word >> (kv_idx % 2 * 16)) & 0xFFFF) >= threshold

    return Dropped(MaskMod(kept), 65536 / (65536 - threshold))


def after_dropout(kept: Tensor, lse_kept: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return out after dropout, [B, L, H, D].

    Parameters
    ----------
    kept : Tensor, [B, L, H, D]
        Out over the kept keys alone.
    lse_kept, lse : Tensor, [B, H, L]
        Over these, and over all.
    scale : float
    """
    # A row that sees no key, or keeps none, is 0, and has no gradient.
    nothing = lse_kept == float("-inf")
    difference = lse_kept.masked_fill(nothing, 0.0) - lse.masked_fill(nothing, 0.0)
    weight = torch.exp(difference).masked_fill(nothing, 0.0) * scale
    return (kept * weight.transpose(1, 2)[..., None]).to(kept.dtype)

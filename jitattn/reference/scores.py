"""Changes of the scores and of their softmax: biases, soft cap, sinks, dropout, normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from jitattn.values.pairs import moved_score, over_pairs, visible_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import MaskMod
    from jitattn.values.norm import L2Norm


class Scores(NamedTuple):
    """Score and softmax modifiers, named as the arguments of `jitattn.attention`."""

    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_state: Tensor | None = None
    qk_norm: L2Norm | None = None
    score_mod: Callable[..., Any] | None = None
    mask_mod: MaskMod | None = None
    q_offset: QOffset | None = None
    first_batch: int = 0  #: index of the first sequence in the whole batch; dropout depends on it

    def unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize q [B, Hq, Lq, D] and k if `qk_norm` asks for it."""
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
        """Apply dropout to weights [B, Hq, Lq, Lkv]: one 16-bit Philox number for each."""
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
        """Apply soft cap, ALiBi and biases to scaled scores [B, Hq, Lq, Lkv]."""
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

    def through_functions(self, scores: Tensor) -> Tensor:
        """Return what the functions of the caller's make of scores [B, Hq, Lq, Lkv]."""
        sizes = tuple(scores.shape)
        if 0 in sizes:
            return scores
        offset = 0 if self.q_offset is None else self.q_offset
        if self.score_mod is not None:
            moved = moved_score(self.score_mod, offset, sizes)
            found = over_pairs(moved, scores, sizes, scores.device, self.first_batch)
            scores = found.to(scores.dtype)
        if self.mask_mod is not None:
            mask = self.mask_mod.moved(offset)
            visible = visible_pairs(mask, sizes, scores.device, self.first_batch)
            scores = scores.masked_fill(~visible, float("-inf"))
        return scores

    def offsets(self, batch: int, corner: int) -> list[int] | None:
        """Return the position of the first query of every sequence; None: as rules say."""
        given = self.q_offset
        if given is None:
            return None
        if isinstance(given, str):
            return [corner] * batch
        if isinstance(given, int):
            return [given] * batch
        return [int(given[self.first_batch + b]) for b in range(batch)]

    def of_sequence(self, b: int) -> Scores:
        """Return the modifiers of one sequence of the batch."""
        bias, slopes = self.bias, self.alibi_slopes
        if bias is not None and bias.shape[0] > 1:
            bias = bias[b : b + 1]
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]
        return self._replace(bias=bias, alibi_slopes=slopes, first_batch=b)

"""Gradients of what is added to scores, and of sinks, on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.kernels.bwd_tiles import score_grad_spec
from jitattn.spec.enums import ScoreTarget, SeqLayout

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from jitattn.run.backward_pass import Pass


def score_gradients(whole: Pass, wanted: Collection[str]) -> dict[str, Tensor]:
    """Compute the gradients of what is added to scores."""
    found = {}
    scores = whole.call.scores
    if "sinks" in wanted:
        found["sinks"] = whole.stats[3].sum((0, 2))
    if "bias" in wanted and scores.bias is not None:
        found["bias"] = _of_bias(whole, scores.bias)
    relative, slopes = scores.relative_bias, scores.alibi_slopes
    if "relative_bias" in wanted or "alibi_slopes" in wanted:
        sums = _by_distance(whole)
        if "relative_bias" in wanted and relative is not None:
            found["relative_bias"] = _of_relative(sums, relative, whole.runtime.len_kv)
        if "alibi_slopes" in wanted and slopes is not None:
            distance = torch.arange(sums.shape[-1], device=sums.device) - whole.runtime.len_kv
            by_head = -(sums * distance.abs()).sum(-1)
            found["alibi_slopes"] = by_head.sum(0) if slopes.dim() == 1 else by_head
    return found


def target_of(bias: Tensor) -> ScoreTarget:
    """Return whether the gradient of a bias has a row for each query, or one for all."""
    return ScoreTarget.MATRIX if bias.shape[2] > 1 else ScoreTarget.ROW


def _of_bias(whole: Pass, bias: Tensor) -> Tensor:
    runtime = whole.runtime
    target = target_of(bias)
    spec = score_grad_spec(whole.problem, whole.arch, target)
    num_q_tiles, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    batch, heads = bias.shape[:2]
    # Lists: tiles begin elsewhere in every sequence, so that each needs a gradient of its own.
    differ = runtime.listed is not None and target is ScoreTarget.MATRIX
    differ &= batch == 1 < runtime.batch and whole.problem.q_layout is not SeqLayout.BATCHED
    if differ:
        batch = runtime.batch
    result = bias.new_zeros((batch, *bias.shape[1:]))
    strides = (result.stride(0), result.stride(2), result.stride(1))  # batch, row, head
    num_ctas = num_kv_tiles * batch * heads
    if target is ScoreTarget.MATRIX:
        num_ctas *= num_q_tiles
    whole.launch(spec, num_ctas, result, strides, targets=(batch, heads))
    return result.sum(0, keepdim=True) if differ else result


def _by_distance(whole: Pass) -> Tensor:
    """Return sums of dS by key - query + Lkv: [B, Hq, Lq + Lkv]."""
    runtime = whole.runtime
    spec = score_grad_spec(whole.problem, whole.arch, ScoreTarget.DISTANCE)
    num_q_tiles, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    batch, heads = runtime.batch, runtime.heads_q
    sums = torch.zeros(
        (2, batch, heads, runtime.len_q + runtime.len_kv),
        dtype=torch.float32,
        device=whole.q.device,
    )
    num_ctas = (num_q_tiles + num_kv_tiles - 1) * batch * heads
    whole.launch(spec, num_ctas, sums, (0, 0, 0), targets=(batch, heads))
    return sums[0] + sums[1]


def _of_relative(sums: Tensor, relative: Tensor, len_kv: int) -> Tensor:
    """From sums by distance to a table whose first and last entries stand for all beyond."""
    by_head = sums.sum(0)
    if relative.shape[0] == 1:
        by_head = by_head.sum(0, keepdim=True)
    reach = relative.shape[1] // 2
    if reach == 0:
        return by_head.sum(1, keepdim=True)
    # Room for every entry on either side: index 0 is distance -len_kv - reach.
    padded = torch.nn.functional.pad(by_head, (reach, reach))
    low, high = len_kv + 1, len_kv + 2 * reach  # after distance -reach, at distance +reach
    return torch.cat(
        (
            padded[:, :low].sum(1, keepdim=True),
            padded[:, low:high],
            padded[:, high:].sum(1, keepdim=True),
        ),
        1,
    )

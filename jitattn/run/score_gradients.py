"""Reduces kernel buffers to the gradients of biases, relative biases, ALiBi slopes and sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from jitattn.request.problem import Runtime
    from jitattn.request.scores import Scores


def score_gradients(
    buffers: dict[str, Tensor],
    scores: Scores,
    runtime: Runtime,
    bias_differs: bool,
    wanted: Collection[str],
) -> dict[str, Tensor]:
    """Return the gradients of score biases and sinks.

    Parameters
    ----------
    buffers : dict
        Of the backward pass: "stats" [4, B, Hq, Lq] with sinks, "d_bias", and "by_distance", sums
        of dS by key - query + Lkv, [2, B, Hq, Lq + Lkv].
    scores : Scores
    runtime : Runtime
    bias_differs : bool
        Whether "d_bias" has one gradient per sequence of a bias that they share.
    wanted : collection of str
    """
    found = {}
    if "sinks" in wanted:
        found["sinks"] = buffers["stats"][3].sum((0, 2))
    if "bias" in wanted:
        d_bias = buffers["d_bias"]
        found["bias"] = d_bias.sum(0, keepdim=True) if bias_differs else d_bias
    relative, slopes = scores.relative_bias, scores.alibi_slopes
    if "relative_bias" in wanted or "alibi_slopes" in wanted:
        by_distance = buffers["by_distance"]
        sums = by_distance[0] + by_distance[1]
        if "relative_bias" in wanted and relative is not None:
            found["relative_bias"] = _of_relative(sums, relative, runtime.len_kv)
        if "alibi_slopes" in wanted and slopes is not None:
            distance = torch.arange(sums.shape[-1], device=sums.device) - runtime.len_kv
            by_head = -(sums * distance.abs()).sum(-1)
            found["alibi_slopes"] = by_head.sum(0) if slopes.dim() == 1 else by_head
    return found


def _of_relative(sums: Tensor, relative: Tensor, len_kv: int) -> Tensor:
    """Reduce sums by distance to a relative-bias table, whose end entries extend outwards."""
    by_head = sums.sum(0)
    if relative.shape[0] == 1:
        by_head = by_head.sum(0, keepdim=True)
    reach = relative.shape[1] // 2
    if reach == 0:
        return by_head.sum(1, keepdim=True)
    # Padded to cover every entry: index 0 is distance -len_kv - reach.
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

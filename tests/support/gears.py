"""Random tensors, masks, and a check of what a gear promises, for tests of gears."""

from __future__ import annotations

from typing import Any

import torch

import jitattn
from jitattn.values.gears import GEARS
from jitattn.values.tensors import DTYPES
from tests.support.compare import rel_l2

MASKS = {
    "full": {},
    "causal": {"mask": jitattn.Causal()},
    "window": {"mask": jitattn.Window(50, 0, keep_first=3)},
    "stride": {"mask": jitattn.LocalStride(64, 1, 3)},
    "lists": {"mask": jitattn.LocalStride(16, 2, 3)},
    "softcap": {"softcap": 2.0},
    "splits": {"num_splits": 3},
}


def tensors(
    dtype: torch.dtype, len_q: int, len_kv: int, heads: tuple[int, int], dim: int, seed: int = 3
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, len_q, heads[0], dim), (2, len_kv, heads[1], dim), (2, len_kv, heads[1], dim))
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def check(
    qkv: list[torch.Tensor], gear: int, factor: float = 2.0, **arguments: Any
) -> torch.Tensor:
    """Within a factor of the gear's promise: few keys average less."""
    out, lse = jitattn.attention(
        *qkv, gear=gear, out_dtype=torch.float32, return_lse=True, **arguments
    )
    for name in ("tile_rows", "num_splits"):
        arguments.pop(name, None)
    truth, true_lse = jitattn.reference.reference(*qkv, return_lse=True, **arguments)
    assert rel_l2(out, truth) < factor * GEARS[gear].rel_l2[DTYPES[qkv[0].dtype]]
    limit = {3: 2e-3, 4: 3e-2}.get(gear, 2e-5)
    assert (lse - true_lse).nan_to_num(0.0).abs().max() < limit
    return out

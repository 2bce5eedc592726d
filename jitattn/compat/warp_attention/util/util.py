"""Timing, operation counts and errors, at the module path of the published package."""

from __future__ import annotations

from jitattn.compat.warp_attention.util import (
    attn_flop,
    bmm_flop,
    cuda_synchronize,
    cuda_timeit,
    get_absolute_path,
    mae,
    mse,
)

__all__ = [
    "attn_flop",
    "bmm_flop",
    "cuda_synchronize",
    "cuda_timeit",
    "get_absolute_path",
    "mae",
    "mse",
]

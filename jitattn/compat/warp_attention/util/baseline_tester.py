"""Timing of baseline attentions, at the module path of the published package."""

from __future__ import annotations

from jitattn.compat.warp_attention.baseline_tester import (
    attn,
    test_flash_attn,
    test_torch_naive,
    test_torch_sdpa,
)

__all__ = [
    "attn",
    "test_flash_attn",
    "test_torch_naive",
    "test_torch_sdpa",
]

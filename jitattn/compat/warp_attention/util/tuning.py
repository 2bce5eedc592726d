"""Tuning of the version of every gear, at the module path of the published package."""

from __future__ import annotations

from jitattn.compat.warp_attention.warpat_tester import (
    tune,
)

__all__ = [
    "tune",
]

"""The fastest version of every gear, where the published package has them."""

from __future__ import annotations

from jitattn.compat.warp_attention.warpat_tester import (
    tune,
)

__all__ = [
    "tune",
]

"""Times and errors of a gear, where the published package has them."""

from __future__ import annotations

from jitattn.compat.warp_attention.warpat_tester import (
    test_warpat,
)

__all__ = [
    "test_warpat",
]

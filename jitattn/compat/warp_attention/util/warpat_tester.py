"""Times and errors of a gear, at the module path of the published package."""

from __future__ import annotations

from jitattn.compat.warp_attention.warpat_tester import (
    test_warpat,
)

__all__ = [
    "test_warpat",
]

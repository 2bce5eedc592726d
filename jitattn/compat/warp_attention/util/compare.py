"""Charts of gears beside other attentions, at the module path of the published package."""

from __future__ import annotations

from jitattn.compat.warp_attention.warpat_tester import (
    compare,
)

__all__ = [
    "compare",
]

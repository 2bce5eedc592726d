"""Charts of gears beside other attentions, where the published package has them."""

from __future__ import annotations

from jitattn.compat.warp_attention.warpat_tester import (
    compare,
)

__all__ = [
    "compare",
]

"""The version, at the module path of the published package."""

from __future__ import annotations

from jitattn.compat.warp_attention import __version__

__all__ = ["__version__"]

"""The version, where the published package has it."""

from __future__ import annotations

from jitattn.compat.warp_attention import __version__

__all__ = ["__version__"]

"""The package in which FlashAttention 3 has its functions; ours are in `flash_attn_interface`."""

from __future__ import annotations

__version__ = "3.0.0"

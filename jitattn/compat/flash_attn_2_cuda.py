"""The extension module under FlashAttention's functions: tensors in, a list of tensors out."""

from __future__ import annotations

from jitattn.compat.flash_attn._extension import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]

"""The front door of FlashAttention 4 (`flash_attn.cute`, version 4.0.0b36).

What differs, on purpose: every GPU from sm_80 on and CPU tensors are taken, fp32 and every head dim
up to 256; `score_mod` and `mask_mod` are plain Python functions, as FlexAttention has them, with
gradients. CuTe functions, block-sparse tensors, gathered keys and `qv` are refused.
"""

from __future__ import annotations

from jitattn.compat.flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

__version__ = "4.0.0b36"

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

"""The front door of FlashAttention 3 (`flash_attn_interface`, version 3.0.0).

What differs, on purpose: every GPU from sm_80 on and CPU tensors are taken, fp32 and every head dim
up to 256; `attention_chunk` has gradients; the LSE is differentiable. What only steers speed there
(`num_splits`, `pack_gqa`, `sm_margin`, `scheduler_metadata`) has no effect. 8-bit inputs, their
scales, and `qv` are refused.
"""

from __future__ import annotations

from jitattn.compat.flash_attn.flash_attn_interface import maybe_contiguous, round_multiple
from jitattn.compat.flash_attn_interface._functions import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    get_scheduler_metadata,
    round_up_headdim,
)
from jitattn.compat.flash_attn_interface._kvcache import flash_attn_with_kvcache
from jitattn.compat.flash_attn_interface._operators import (
    FlashAttnFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    _flash_attn_backward,
    _flash_attn_forward,
)

__version__ = "3.0.0"

__all__ = [
    "FlashAttnFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
    "round_multiple",
    "round_up_headdim",
]

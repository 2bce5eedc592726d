"""The front door of SageAttention 2.2.0: its functions, computed by `jitattn.attention` at gear 4.

What differs, on purpose: fp32 inputs, CPU tensors and every head dim up to 256 are taken; there are
gradients, with the numerics of gear 2; `sageattn` honours a mask; the kind of quantization is
chosen by the GPU alone.
"""

from __future__ import annotations

from jitattn.compat.sageattention.core import (
    sageattn,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_varlen,
)

__version__ = "2.2.0"

__all__ = [
    "sageattn",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_varlen",
]

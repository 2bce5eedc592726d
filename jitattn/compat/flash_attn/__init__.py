"""The front door of FlashAttention-2 and of FlashAttention-SWAA's additions to it.

`keep_first` and `force_fa_decode` stand where SWAA has them, between `softcap` and `alibi_slopes`.
What differs, on purpose: `keep_first` is right for windows of every size; `force_fa_decode` holds
in the backward pass; pages may have any size; softcap and dropout go together; fp32 and every head
dim up to 256 are taken; the LSE of a causal call with ALiBi slopes is that of the scores as
documented, without a shift of each row. Dropout draws other weights than the original from the same
seed, to 2^-16 rather than 2^-8, and S_dmask says which.
"""

from __future__ import annotations

from jitattn.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

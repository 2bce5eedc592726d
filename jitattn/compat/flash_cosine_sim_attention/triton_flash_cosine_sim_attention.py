"""The module of newer versions' Triton kernel."""

from __future__ import annotations

from jitattn.compat.flash_cosine_sim_attention import triton_flash_cosine_sim_attention

__all__ = ["triton_flash_cosine_sim_attention"]

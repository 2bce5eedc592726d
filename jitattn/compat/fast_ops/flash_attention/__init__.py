"""Attention of fast-ops: `flash_attention` [B, H, L, D], `flash_attention_triton` [B, L, H, D]."""

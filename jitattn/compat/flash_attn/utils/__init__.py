"""`flash_attn.utils`: timers."""

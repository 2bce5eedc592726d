"""What of xformers' choice of operators programs ask for; the choice itself is the core's."""

from __future__ import annotations

_uses_fa3 = True


def _set_use_fa3(use_flash_attention3: bool) -> None:
    """Remember whether FlashAttention 3's operators are wanted; no effect."""
    global _uses_fa3
    _uses_fa3 = bool(use_flash_attention3)


def _get_use_fa3() -> bool:
    """Return what `_set_use_fa3` was told."""
    return _uses_fa3


def fa3_available() -> bool:
    """Return True: operators of that name are here, on every GPU."""
    return True

"""The operators that xformers has from FlashAttention 2, by name."""

from __future__ import annotations

from jitattn.compat.xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase

#: Of the names.
FLASH_VERSION = "2.8.3"


class FwOp(AttentionFwOpBase):
    """The forward operator of FlashAttention 2, by name."""

    NAME = "fa2F@2.8.3"


class BwOp(AttentionBwOpBase):
    """The backward operator of FlashAttention 2, by name."""

    NAME = "fa2B@2.8.3"

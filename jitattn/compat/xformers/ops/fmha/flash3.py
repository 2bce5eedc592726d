"""The operators that xformers has from FlashAttention 3, by name."""

from __future__ import annotations

from jitattn.compat.xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase

#: Of the names.
FLASH_VERSION = "3.0.0"


class FwOp(AttentionFwOpBase):
    """The forward operator of FlashAttention 3, by name."""

    NAME = "fa3F@3.0.0"


class BwOp(AttentionBwOpBase):
    """The backward operator of FlashAttention 3, by name."""

    NAME = "fa3B@3.0.0"


class FwOp_KVSplit(FwOp):  # noqa: N801 - the original's name
    """The forward operator with split keys, by name."""

    NAME = "fa3F_splitKV@3.0.0"

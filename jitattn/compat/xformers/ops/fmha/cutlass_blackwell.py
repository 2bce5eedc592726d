"""The operators that xformers has for Blackwell, by name."""

from __future__ import annotations

from jitattn.compat.xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """The forward operator for Blackwell, by name."""

    NAME = "cutlassF-blackwell"


class BwOp(AttentionBwOpBase):
    """The backward operator for Blackwell, by name."""

    NAME = "cutlassB-blackwell"

"""The operators that xformers has from CUTLASS, by name."""

from __future__ import annotations

from jitattn.compat.xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """The forward operator of CUTLASS, by name."""

    NAME = "cutlassF-pt"


class BwOp(AttentionBwOpBase):
    """The backward operator of CUTLASS, by name."""

    NAME = "cutlassB-pt"

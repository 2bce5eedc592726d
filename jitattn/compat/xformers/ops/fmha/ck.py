"""The operators that xformers has from Composable Kernel, by name."""

from __future__ import annotations

from jitattn.compat.xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """The forward operator of Composable Kernel, by name."""

    NAME = "ckF"


class BwOp(AttentionBwOpBase):
    """The backward operator of Composable Kernel, by name."""

    NAME = "ckB"

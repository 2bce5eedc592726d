"""The operators that xformers has for split keys from Composable Kernel, by name."""

from __future__ import annotations

from typing import Final

from jitattn.compat.xformers.ops.fmha.common import AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """The operator that chooses how often keys are split, by name."""

    NAME = "ck_splitKF"


#: By the number of splits, which has no effect: `jitattn.attention` chooses it.
_BY_SPLITS: Final[dict[int, type[AttentionFwOpBase]]] = {
    splits: type(f"FwOp_S{splits}", (FwOp,), {"NAME": f"ck_splitK{splits}"})
    for splits in (1, 2, 4, 8, 16, 32, 64, 128)
}
FwOp_S1 = _BY_SPLITS[1]
FwOp_S2 = _BY_SPLITS[2]
FwOp_S4 = _BY_SPLITS[4]
FwOp_S8 = _BY_SPLITS[8]
FwOp_S16 = _BY_SPLITS[16]
FwOp_S32 = _BY_SPLITS[32]
FwOp_S64 = _BY_SPLITS[64]
FwOp_S128 = _BY_SPLITS[128]

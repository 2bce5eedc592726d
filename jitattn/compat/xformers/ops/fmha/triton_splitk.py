"""The operators that xformers has for split keys in Triton, by name."""

from __future__ import annotations

from typing import Final

from jitattn.compat.xformers.ops.fmha.common import AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """The operator that chooses how often keys are split, by name."""

    NAME = "triton_splitKF"


#: By the number of splits, which has no effect: `jitattn.attention` chooses it.
FwOp_Map: Final[dict[int, type[AttentionFwOpBase]]] = {
    splits: type(f"FwOp_S{splits}", (FwOp,), {"NAME": f"triton_splitK{splits}"})
    for splits in (1, 2, 4, 8, 16, 32, 48, 64, 72, 80, 96, 112, 128)
}
FwOp_S1 = FwOp_Map[1]
FwOp_S2 = FwOp_Map[2]
FwOp_S4 = FwOp_Map[4]
FwOp_S8 = FwOp_Map[8]
FwOp_S16 = FwOp_Map[16]
FwOp_S32 = FwOp_Map[32]
FwOp_S64 = FwOp_Map[64]
FwOp_S128 = FwOp_Map[128]

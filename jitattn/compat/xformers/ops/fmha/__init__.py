"""Memory-efficient attention: xformers' functions, translated to `jitattn.attention`."""

from __future__ import annotations

from typing import Final

from jitattn.compat.xformers.ops.fmha import (
    attn_bias,
    ck,
    ck_splitk,
    cutlass,
    cutlass_blackwell,
    flash,
    flash3,
    triton_splitk,
)
from jitattn.compat.xformers.ops.fmha._functions import (
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_partial,
    merge_attentions,
)
from jitattn.compat.xformers.ops.fmha.attn_bias import (
    VARLEN_BIASES,
    AttentionBias,
    BlockDiagonalMask,
    LowerTriangularMask,
)
from jitattn.compat.xformers.ops.fmha.common import (
    AttentionBwOpBase,
    AttentionFwOpBase,
    AttentionOp,
    AttentionOpBase,
    Context,
    Gradients,
    Inputs,
    bmk2bmhk,
)
from jitattn.compat.xformers.ops.fmha.dispatch import _get_use_fa3, _set_use_fa3

MemoryEfficientAttentionCutlassOp: Final = (cutlass.FwOp, cutlass.BwOp)
MemoryEfficientAttentionCutlassBlackwellOp: Final = (cutlass_blackwell.FwOp, cutlass_blackwell.BwOp)
MemoryEfficientAttentionCutlassFwdFlashBwOp: Final = (cutlass.FwOp, flash.BwOp)
MemoryEfficientAttentionFlashAttentionOp: Final = (flash.FwOp, flash.BwOp)
MemoryEfficientAttentionCkOp: Final = (ck.FwOp, ck.BwOp)
MemoryEfficientAttentionSplitKCkOp: Final = (ck_splitk.FwOp, ck.BwOp)

ALL_FW_OPS: Final[list[type[AttentionFwOpBase]]] = [
    cutlass.FwOp,
    cutlass_blackwell.FwOp,
    flash.FwOp,
    flash3.FwOp,
    triton_splitk.FwOp,
]
ALL_BW_OPS: Final[list[type[AttentionBwOpBase]]] = [
    cutlass.BwOp,
    cutlass_blackwell.BwOp,
    flash.BwOp,
    flash3.BwOp,
]

__all__ = [
    "ALL_BW_OPS",
    "ALL_FW_OPS",
    "VARLEN_BIASES",
    "AttentionBias",
    "AttentionBwOpBase",
    "AttentionFwOpBase",
    "AttentionOp",
    "AttentionOpBase",
    "BlockDiagonalMask",
    "Context",
    "Gradients",
    "Inputs",
    "LowerTriangularMask",
    "MemoryEfficientAttentionCkOp",
    "MemoryEfficientAttentionCutlassBlackwellOp",
    "MemoryEfficientAttentionCutlassFwdFlashBwOp",
    "MemoryEfficientAttentionCutlassOp",
    "MemoryEfficientAttentionFlashAttentionOp",
    "MemoryEfficientAttentionSplitKCkOp",
    "_get_use_fa3",
    "_set_use_fa3",
    "attn_bias",
    "bmk2bmhk",
    "memory_efficient_attention",
    "memory_efficient_attention_backward",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_partial",
    "merge_attentions",
]

"""The kernel families, one file each: spec, arguments, tiles, and compile matrix.

A family is registered by one line here, an entry in cuda_src/entry, and its device code. Everything
else finds it by name (`spec.kernel_spec.families`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jitattn.kernels.append import AppendSpec
from jitattn.kernels.bwd import BwdSpec
from jitattn.kernels.bwd_captured import CapturedGradSpec
from jitattn.kernels.bwd_postprocess import BwdPostprocessSpec
from jitattn.kernels.bwd_preprocess import BwdPreprocessSpec
from jitattn.kernels.bwd_scores import ScoreGradSpec
from jitattn.kernels.bwd_sm90 import BwdSm90Spec
from jitattn.kernels.combine import CombineGradSpec, CombineSpec
from jitattn.kernels.fwd import FwdSpec
from jitattn.kernels.fwd_sm90 import FwdSm90Spec
from jitattn.kernels.kv_scatter import ScatterSpec
from jitattn.kernels.mask_lists import MaskListsSpec
from jitattn.kernels.norm import NormGradSpec, NormSpec
from jitattn.kernels.quantize import ChannelStatsSpec, QuantizeSpec
from jitattn.kernels.rotary import RotarySpec
from jitattn.kernels.split_fp32 import SplitFp32Spec
from jitattn.kernels.sum_parts import SumPartsSpec

if TYPE_CHECKING:
    from jitattn.spec.kernel_spec import KernelSpec

#: All families, in the order of error messages.
FAMILIES: Final[tuple[type[KernelSpec], ...]] = (
    FwdSpec,
    FwdSm90Spec,
    BwdSpec,
    BwdSm90Spec,
    ScoreGradSpec,
    CapturedGradSpec,
    CombineSpec,
    CombineGradSpec,
    AppendSpec,
    RotarySpec,
    NormSpec,
    NormGradSpec,
    BwdPreprocessSpec,
    BwdPostprocessSpec,
    SumPartsSpec,
    ScatterSpec,
    MaskListsSpec,
    ChannelStatsSpec,
    QuantizeSpec,
    SplitFp32Spec,
)

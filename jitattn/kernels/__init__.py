"""The kernel families, a file each: spec, arguments, tiles, and what the compile matrix has of it.

A family is one line here, an entry in cuda_src/entry, and its device code. Everything else finds it
by name (`spec.kernel_spec.families`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jitattn.kernels.append import AppendSpec
from jitattn.kernels.bwd import BwdSpec
from jitattn.kernels.bwd_scores import ScoreGradSpec
from jitattn.kernels.fwd import FwdSpec
from jitattn.kernels.kv_scatter import ScatterSpec
from jitattn.kernels.merge import MergeGradSpec, MergeSpec
from jitattn.kernels.norm import NormGradSpec, NormSpec
from jitattn.kernels.quantize import ChannelStatsSpec, QuantizeSpec
from jitattn.kernels.rotary import RotarySpec
from jitattn.kernels.round import RoundSpec
from jitattn.kernels.split_halves import SplitHalvesSpec
from jitattn.kernels.stats import StatsSpec
from jitattn.kernels.sum_parts import SumPartsSpec

if TYPE_CHECKING:
    from jitattn.spec.kernel_spec import KernelSpec

#: In the order in which messages name them.
FAMILIES: Final[tuple[type[KernelSpec], ...]] = (
    FwdSpec,
    BwdSpec,
    ScoreGradSpec,
    MergeSpec,
    MergeGradSpec,
    AppendSpec,
    RotarySpec,
    NormSpec,
    NormGradSpec,
    StatsSpec,
    RoundSpec,
    SumPartsSpec,
    ScatterSpec,
    ChannelStatsSpec,
    QuantizeSpec,
    SplitHalvesSpec,
)

"""Gear 4: which problems have kernels with Q and K in 8 bits, and which; without torch.

There are none for sequences of their own and pages; for whatever is done with scores but masks of
positions; for other head dims than 32, 64, 128 and 256, on sm_90 than the last two; for other
alignments than 16 bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from jitattn.jit.enums import Access, Dtype, MaskKind, Numerics, Switch
from jitattn.jit.spec import ChannelStatsSpec, QuantizeSpec, arch_number

if TYPE_CHECKING:
    from jitattn.jit.spec import KernelSpec, Problem

HEAD_DIMS: Final = (32, 64, 128, 256)
#: Rows of a CTA that looks at channels, and keys that share a scale.
CHUNK_ROWS: Final = 512
BLOCK_KEYS: Final = 64
#: Below, exponentials and not products are what a step waits for: D=64 takes 1.02 of gear 2's time
#: on an H200.
_LEAST_ON_SM90: Final = 128
_MASKS: Final = (MaskKind.FULL, MaskKind.CAUSAL, MaskKind.WINDOW, MaskKind.LOCAL_STRIDE)
_TO_SCORES: Final = ("relative_bias", "alibi", "softcap", "sinks", "key_padding", "dense",
                     "dropout", "fixed_shift")  # fmt: skip


def problem_in_8_bits(problem: Problem, arch: str) -> Problem | None:
    """Return the problem of the kernel for 8 bits, if there is one that pays on `arch`."""
    if arch_number(arch) >= 90 and problem.head_dim < _LEAST_ON_SM90:
        return None
    is_plain = problem.is_uniform and problem.mask in _MASKS and problem.access is Access.VEC16
    is_plain &= problem.head_dim in HEAD_DIMS and problem.dtype is not Dtype.FP32
    is_plain &= problem.bias.value == "none"
    is_plain &= all(getattr(problem, name) is Switch.OFF for name in _TO_SCORES)
    return replace(problem, numerics=Numerics.INT8) if is_plain else None


def specs_of_rounding(problem: Problem, arch: str) -> list[KernelSpec]:
    """Return the kernels that bring q and k to 8 bits."""
    dtype, dim = problem.dtype, problem.head_dim
    return [
        ChannelStatsSpec(dtype=dtype, head_dim=dim, chunk_rows=CHUNK_ROWS, arch=arch),
        QuantizeSpec(dtype=dtype, head_dim=dim, arch=arch),
    ]

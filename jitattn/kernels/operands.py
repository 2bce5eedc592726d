"""Selects the problems whose operands are quantized or split for the kernel; without torch.

Gear 4 brings Q and K to 8 bits and V to fp16, and fp32 inputs become one or two fp16 parts each.
Neither is there for whatever is done with scores but masks of positions and, with fp16 parts, key
padding, nor for other alignments than 16 bytes; fp16 parts not for sequences of their own, in pages
or not. Backward kernels have fp16 parts whatever is done with scores but biases and dense masks.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from jitattn.spec.enums import (
    Access,
    BiasKind,
    Dtype,
    MaskKind,
    Numerics,
    Switch,
)
from jitattn.spec.kernel_spec import SWITCHES, arch_number

if TYPE_CHECKING:
    from jitattn.spec.kernel_spec import Problem

#: Head dims in 8 bits, and the largest as fp16 parts, which are multiples of 16.
HEAD_DIMS: Final = (32, 64, 128, 256)
LARGEST_SPLIT_FP32: Final = 128
#: Rows of a CTA that quantizes or splits; keys of one scale.
BLOCK_KEYS: Final = 64
#: Below these head dims, exponentials and not products are what a step waits for. Gear 2's time
#: over gear 4's on an H200, full / causal: D=32 1.00 / 1.05, D=64 1.16 / 1.13; with sums in fp32
#: D=64 0.98.
_LEAST_ON_SM90: Final = {Numerics.INT8_F16: 64, Numerics.INT8: 128}
#: What TF32 products are, of fp16 parts.
_SPLIT_FP32: Final = {Numerics.TF32X3: Numerics.F16X3, Numerics.TF32: Numerics.F16X1}
_MASKS: Final = (MaskKind.FULL, MaskKind.CAUSAL, MaskKind.WINDOW, MaskKind.LOCAL_STRIDE)
#: Optional inputs that the kernels for quantized and for split operands do not take.
_TO_SCORES: Final = tuple(name for name in SWITCHES if name != "key_padding")
#: Numerics classes by the dtype of the inputs.
_NUMERICS: Final = {
    Dtype.FP16: (Numerics.F32_ACC, Numerics.SPLIT_P, Numerics.F16_ACC, Numerics.INT8,
                 Numerics.INT8_F16),
    Dtype.BF16: (Numerics.F32_ACC, Numerics.SPLIT_P, Numerics.INT8, Numerics.INT8_F16),
    Dtype.FP32: (Numerics.TF32X3, Numerics.TF32, Numerics.F16X3, Numerics.F16X1),
}  # fmt: skip


def numerics_fault(problem: Problem) -> str | None:
    """Say why no kernel has the numerics class of a problem; None if one may have it."""
    numerics, allowed = problem.numerics, _NUMERICS[problem.dtype]
    if numerics not in allowed:
        return f"numerics={numerics}: it must be one of {', '.join(allowed)} for {problem.dtype}"
    dims = (problem.head_dim, problem.head_dim_v)
    if numerics.num_parts and any(dim % 16 or dim > LARGEST_SPLIT_FP32 for dim in dims):
        return (
            f"numerics={numerics} with head_dim={dims[0]} and head_dim_v={dims[1]}: it needs "
            f"multiples of 16 up to {LARGEST_SPLIT_FP32}"
        )
    return None


@functools.cache
def problem_in_8_bits(problem: Problem, arch: str) -> Problem | None:
    """Return the problem of the kernel for 8 bits, if there is one that pays on `arch`."""
    fits = problem.head_dim in HEAD_DIMS and problem.dtype is not Dtype.FP32
    fits &= problem.key_padding is Switch.OFF
    if not (fits and _is_plain(problem)):
        return None
    # Sums in fp16 take V in fp16 and scaled, which would ask for much memory if it is in pages.
    has_fp16_acc = not problem.kv_layout.page_group and problem.head_dim_v == problem.head_dim
    numerics = Numerics.INT8_F16 if has_fp16_acc else Numerics.INT8
    if arch_number(arch) >= 90 and problem.head_dim < _LEAST_ON_SM90[numerics]:
        return None
    return replace(problem, numerics=numerics)


@functools.cache
def split_fp32_problem(problem: Problem) -> Problem | None:
    """Return the problem of the kernel for fp16 parts, if there is one."""
    dims = (problem.head_dim, problem.head_dim_v)
    fits = all(dim % 16 == 0 and dim <= LARGEST_SPLIT_FP32 for dim in dims)
    numerics = _SPLIT_FP32.get(problem.numerics)
    if numerics is None or not (fits and problem.is_uniform):
        return None
    # A bound instead of the maximum saves little, and would leave small weights fewer bits.
    problem = replace(problem, numerics=numerics, fixed_shift=Switch.OFF)
    return problem if _is_plain(problem) else None


@functools.cache
def split_fp32_backward(problem: Problem) -> Problem | None:
    """Return the problem of the backward kernel for fp16 parts, if there is one.

    `problem` is a backward kernel's. A bias or a dense mask may hide keys whatever they hold, and
    numbers of any size have no place beside others of the same scale.
    """
    dims = (problem.head_dim, problem.head_dim_v)
    fits = all(dim % 16 == 0 and dim <= LARGEST_SPLIT_FP32 for dim in dims)
    fits &= problem.numerics in (Numerics.TF32X3, Numerics.F16X3)
    fits &= problem.is_uniform and problem.access is Access.VEC16
    fits &= problem.bias is BiasKind.NONE and problem.dense is Switch.OFF
    fits &= problem.mask is not MaskKind.FINE_STRIDE  # a scale is of 64 neighbouring keys
    return replace(problem, numerics=Numerics.F16X3) if fits else None


def _is_plain(problem: Problem) -> bool:
    """Return whether positions and key padding alone decide, and rows are aligned."""
    fits = problem.mask in _MASKS and problem.access is Access.VEC16
    fits &= problem.bias is BiasKind.NONE
    return fits and all(getattr(problem, name) is Switch.OFF for name in _TO_SCORES)

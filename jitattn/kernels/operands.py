"""Selects the problems whose operands are quantized or split; imports no torch.

Gear 4 quantizes Q and K to INT8 and converts V to fp16; fp32 inputs are split into one or two fp16
parts. Both need 16-byte alignment and positional masks only; fp16 parts also allow key padding, but
no sequence layouts or pages. Backward kernels take fp16 parts with all score modifications but
biases and dense masks.
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

#: Head dims with INT8 kernels, and the largest with fp16 parts, which are multiples of 16.
HEAD_DIMS: Final = (32, 64, 128, 256)
LARGEST_SPLIT_FP32: Final = 128
#: Rows per CTA of the quantize and split kernels, and keys per scale.
BLOCK_KEYS: Final = 64
#: Below these head dims a step is bound by exponentials, not by products. Gear 2's time
#: over gear 4's on an H200, full / causal: D=32 1.00 / 1.05, D=64 1.16 / 1.13; with sums in fp32
#: D=64 0.98.
_LEAST_ON_SM90: Final = {Numerics.INT8_F16: 64, Numerics.INT8: 128}
#: The fp16-part equivalent of each TF32 numerics class.
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
    """Explain why no kernel supports the numerics of a problem; None if one may."""
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
    """Return the problem of the INT8 kernel, or None if `arch` gains nothing or has none."""
    fits = problem.head_dim in HEAD_DIMS and problem.dtype is not Dtype.FP32
    fits &= problem.key_padding is Switch.OFF
    if not (fits and _is_plain(problem)):
        return None
    # fp16 accumulation needs a scaled fp16 copy of V, which is large for pages.
    has_fp16_acc = not problem.kv_layout.page_group and problem.head_dim_v == problem.head_dim
    numerics = Numerics.INT8_F16 if has_fp16_acc else Numerics.INT8
    if arch_number(arch) >= 90 and problem.head_dim < _LEAST_ON_SM90[numerics]:
        return None
    return replace(problem, numerics=numerics)


@functools.cache
def split_fp32_problem(problem: Problem) -> Problem | None:
    """Return the problem of the kernel for fp16 parts, or None."""
    dims = (problem.head_dim, problem.head_dim_v)
    fits = all(dim % 16 == 0 and dim <= LARGEST_SPLIT_FP32 for dim in dims)
    numerics = _SPLIT_FP32.get(problem.numerics)
    if numerics is None or not (fits and problem.is_uniform):
        return None
    # A fixed shift saves little here, and leaves fewer bits for small weights.
    problem = replace(problem, numerics=numerics, fixed_shift=Switch.OFF)
    return problem if _is_plain(problem) else None


@functools.cache
def split_fp32_backward(problem: Problem) -> Problem | None:
    """Return the problem of the backward kernel for fp16 parts, or None.

    `problem` is a backward kernel's. Keys hidden by a bias or a dense mask may have any magnitude,
    which would flush their neighbours of the same scale to zero.
    """
    dims = (problem.head_dim, problem.head_dim_v)
    fits = all(dim % 16 == 0 and dim <= LARGEST_SPLIT_FP32 for dim in dims)
    fits &= problem.numerics in (Numerics.TF32X3, Numerics.F16X3)
    fits &= problem.is_uniform and problem.access is Access.VEC16
    fits &= problem.bias is BiasKind.NONE and problem.dense is Switch.OFF
    fits &= problem.mask is not MaskKind.FINE_STRIDE  # one scale per 64 consecutive keys
    return replace(problem, numerics=Numerics.F16X3) if fits else None


def _is_plain(problem: Problem) -> bool:
    """Return whether only positional masks and key padding apply, and rows are aligned."""
    fits = problem.mask in _MASKS and problem.access is Access.VEC16
    fits &= problem.bias is BiasKind.NONE and not problem.function
    return fits and all(getattr(problem, name) is Switch.OFF for name in _TO_SCORES)

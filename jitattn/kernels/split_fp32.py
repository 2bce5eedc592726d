"""The split_fp32 kernel: splits fp32 operands into scaled fp16 parts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.kernels.matrix import split_fp32_problems
from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Dtype, MatrixSize, Numerics, Switch
from jitattn.spec.kernel_spec import KernelSpec, Problem

#: Parameters of the split kernel (split_fp32.cuh).
SPLIT_FP32: Final = ArgumentStruct(
    "SplitFp32Params",
    (
        Argument("q", "const float*", "[B, Lq, Hq, D]"),
        Argument("k", "const float*", "[B, Lkv, Hkv, D]"),
        Argument("v", "const float*", "[B, Lkv, Hkv, Dv]"),
        Argument("d_out", "const float*", "[B, Lq, Hq, Dv]; null: of a forward kernel"),
        Argument(
            "key_padding",
            "const uint8_t*",
            "[B, Lkv], nonzero = attend; null: all. What is hidden becomes 0",
        ),
        Argument("q_out", "uint16_t*", "[B, Hq, Lq, parts, D], contiguous, as all that follow"),
        Argument("k_out", "uint16_t*", "[B, Hkv, Lkv, parts, D]"),
        Argument("v_out", "uint16_t*", "[B, Hkv, Lkv, parts, Dv]"),
        Argument("d_out_out", "uint16_t*", "[B, Hq, Lq, parts, Dv]"),
        Argument("q_scale", "float*", "[B, Hq, Lq]; with dO as d_out_scale"),
        Argument("k_scale", "float*", "[B, Hkv, ceil(Lkv / 64)]"),
        Argument("v_scale", "float*", "[B, Hkv, ceil(Lkv / 64)]"),
        Argument("d_out_scale", "float*", "[B, Hq, ceil(Lq / 64)]"),
        *strides("q", "batch", "row", "head"),
        *strides("k", "batch", "row", "head"),
        *strides("v", "batch", "row", "head"),
        *strides("d_out", "batch", "row", "head"),
        Argument("key_padding_stride", "int64_t"),
        Argument("batch", "int32_t"),
        Argument("len_q", "int32_t"),
        Argument("len_kv", "int32_t"),
        Argument("heads_q", "int32_t"),
        Argument("heads_kv", "int32_t"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFp32Spec(KernelSpec):
    """Spec of the kernel that splits q, k and v, and for a backward kernel dO, into fp16 parts."""

    family: ClassVar[str] = "split_fp32"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(SPLIT_FP32)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype  #: of q, k and v: fp32
    head_dim: int
    head_dim_v: int
    num_parts: int  #: 2 (hi, lo), or 1 (hi)
    gradients: Switch  #: splits dO too; q has scales per row block, too
    arch: str

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        if size < MatrixSize.TUNED:
            return
        for problem in split_fp32_problems():
            yield split_fp32_spec(problem, arch)
            if problem.numerics is Numerics.F16X3 and problem.head_dim == problem.head_dim_v:
                yield split_fp32_spec(problem, arch, gradients=True)


@functools.cache
def split_fp32_spec(problem: Problem, arch: str, *, gradients: bool = False) -> SplitFp32Spec:
    """Return the spec of the split kernel for a problem with fp16 parts."""
    return SplitFp32Spec(
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        num_parts=problem.numerics.num_parts,
        gradients=Switch.ON if gradients else Switch.OFF,
        arch=arch,
    )

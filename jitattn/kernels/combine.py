"""The combine kernels: merge partial results over disjoint sets of keys, and the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Dtype, MatrixSize
from jitattn.spec.kernel_spec import KernelSpec

#: Merges partial results; a row is a query of one head.
COMBINE: Final = ArgumentStruct(
    "CombineParams",
    (
        Argument("parts", "const void*", "[num_parts, B, Lq, Hq, Dv]"),
        Argument("part_lses", "const float*", "[num_parts, B, Hq, Lq]"),
        Argument("out", "void*", "[B, Hq, Lq, Dv], contiguous"),
        Argument("lse", "float*", "[B, Hq, Lq], contiguous"),
        *strides("part", "part", "batch", "row", "head"),
        *strides("lse", "part", "batch", "row", "head"),
        Argument("num_rows", "int64_t", "B * Hq * Lq"),
        Argument("len_q", "int32_t"),
        Argument("heads_q", "int32_t"),
        Argument("num_parts", "int32_t"),
    ),
)

#: The gradient of a merge. Tensors per part are contiguous [num_parts, B, Hq, Lq, ...], but the
#: parts themselves are [num_parts, B, Lq, Hq, Dv].
COMBINE_GRAD: Final = ArgumentStruct(
    "CombineGradParams",
    (
        Argument("parts", "const void*"),
        Argument("part_lses", "const float*", "contiguous"),
        Argument("out", "const void*", "[B, Hq, Lq, Dv], contiguous"),
        Argument("lse", "const float*", "[B, Hq, Lq], contiguous"),
        Argument("d_out", "const void*", "as out"),
        Argument("d_lse", "const float*", "as lse; null: 0"),
        Argument("d_parts", "void*", "contiguous"),
        Argument("d_part_lses", "float*", "contiguous"),
        *strides("part", "part", "batch", "row", "head"),
        Argument("num_rows", "int64_t", "B * Hq * Lq"),
        Argument("len_q", "int32_t"),
        Argument("heads_q", "int32_t"),
        Argument("num_parts", "int32_t"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfParts(KernelSpec):
    """Common fields of the combine kernels."""

    num_threads: ClassVar[int] = 128
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype  #: of the parts
    out_dtype: Dtype
    head_dim_v: int
    arch: str

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        del size
        yield cls(dtype=Dtype.BF16, out_dtype=Dtype.BF16, head_dim_v=128, arch=arch)


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineSpec(_OfParts):
    """Spec of the kernel that merges partial results in a fixed order."""

    family: ClassVar[str] = "combine"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(COMBINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineGradSpec(_OfParts):
    """Spec of the kernel for the gradient of a merge."""

    family: ClassVar[str] = "combine_grad"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(COMBINE_GRAD)

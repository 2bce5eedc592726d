"""The sum_parts kernel: adds up fp32 parts of a gradient in fixed order, and rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Dtype, MatrixSize
from jitattn.spec.kernel_spec import KernelSpec

#: Adds up fp32 parts that have the layout of the gradient.
SUM_PARTS: Final = ArgumentStruct(
    "SumPartsParams",
    (
        Argument("parts", "const float*", "[num_parts, B, length, H, D]"),
        Argument("out", "void*", "[B, length, H, D]"),
        Argument("unscale", "const float*", "multiplies the result; null: 1"),
        *strides("part", "part", "batch", "row", "head"),
        *strides("out", "batch", "row", "head"),
        Argument("num_rows", "int64_t", "B * length * H"),
        Argument("length", "int32_t"),
        Argument("heads", "int32_t"),
        Argument("num_parts", "int32_t"),
        Argument("scale", "float"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumPartsSpec(KernelSpec):
    """Spec of the kernel that adds up parts with the layout of the gradient."""

    family: ClassVar[str] = "sum_parts"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(SUM_PARTS)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype  #: of the gradient
    head_dim: int
    arch: str

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        del size
        yield cls(dtype=Dtype.BF16, head_dim=64, arch=arch)
        yield cls(dtype=Dtype.FP32, head_dim=33, arch=arch)

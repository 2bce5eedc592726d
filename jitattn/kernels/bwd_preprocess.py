"""The backward preprocess kernel: base-2 LSE and delta of every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Access, Dtype, MatrixSize
from jitattn.spec.kernel_spec import KernelSpec

#: Row statistics for the backward kernels. A row is a query of one head.
BWD_PREPROCESS: Final = ArgumentStruct(
    "BwdPreprocessParams",
    (
        Argument("out", "const void*", "[B, Lq, Hq, Dv]"),
        Argument("d_out", "const void*", "[B, Lq, Hq, Dv]"),
        Argument("lse", "const float*", "[B, Hq, Lq]"),
        Argument("d_lse", "const float*", "[B, Hq, Lq]; null: 0"),
        Argument("sinks", "const float*", "[Hq]; null: none"),
        Argument("d_out_scale", "const float*", "by which delta is scaled; null: 1"),
        Argument("lse_log2", "float*", "[B, Hq, Lq], contiguous"),
        Argument("delta", "float*", "[B, Hq, Lq], contiguous"),
        Argument(
            "sink_rest",
            "float*",
            "[B, Hq, Lq], contiguous: part of the weights that the sink leaves",
        ),
        Argument("d_sink", "float*", "[B, Hq, Lq], contiguous: what each row adds to dsinks"),
        *strides("out", "batch", "row", "head"),
        *strides("d_out", "batch", "row", "head"),
        *strides("lse", "batch", "head", "row"),
        *strides("d_lse", "batch", "head", "row"),
        Argument("num_rows", "int64_t", "B * Lq * Hq"),
        Argument("len_q", "int32_t"),
        Argument("heads_q", "int32_t"),
        Argument("folds_sinks", "int32_t", "1: lse_log2 includes the sink, and delta ignores it"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BwdPreprocessSpec(KernelSpec):
    """Spec of the backward preprocess kernel."""

    family: ClassVar[str] = "bwd_preprocess"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(BWD_PREPROCESS)
    derived: ClassVar[tuple[str, ...]] = ("lanes",)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype  #: of out and dO
    head_dim_v: int
    access: Access
    arch: str

    @property
    def lanes(self) -> int:
        """Return the lanes per row: a power of two, each with two or more accesses if possible."""
        wide = 16 // self.dtype.bytes if self.access is Access.VEC16 else 1
        accesses = self.head_dim_v // wide
        return min(32, 1 << (max(accesses // 2, 1).bit_length() - 1))

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        del size
        for dtype, dim in ((Dtype.BF16, 64), (Dtype.FP32, 33)):
            yield from bwd_preprocess_specs(dtype, dim, arch)


def bwd_preprocess_specs(dtype: Dtype, head_dim_v: int, arch: str) -> list[BwdPreprocessSpec]:
    """Return the preprocess kernels that calls may need, depending on alignment."""
    return [
        BwdPreprocessSpec(dtype=dtype, head_dim_v=head_dim_v, access=access, arch=arch)
        for access in Access
        if access is Access.ELEMENT or head_dim_v * dtype.bytes % 16 == 0
    ]

"""The KV scatter kernel: adds up per-sequence parts of dK or dV into shared rows or pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Dtype, MatrixSize
from jitattn.spec.kernel_spec import KernelSpec

#: Adds per-sequence parts of dK or dV into memory that sequences may share: pages, or batch rows
#: named by `batch_idx`. An entry is a place of the block table.
SCATTER: Final = ArgumentStruct(
    "ScatterParams",
    (
        Argument("sum", "const float*", "[num_parts, B, longest, Hkv, D]"),
        Argument("out", "void*", "[num_pages, page_size, Hkv, D]"),
        Argument("unscale", "const float*", "multiplies the result; null: 1"),
        Argument(
            "entries",
            "const int64_t*",
            "[B * table_width]: places of the table, in the order of their pages",
        ),
        Argument("bounds", "const int64_t*", "[num_pages + 1]: first entry of each page"),
        Argument("kv_start", "const int32_t*", "as FwdSeqParams"),
        Argument("kv_stop", "const int32_t*"),
        *strides("sum", "part", "batch", "row", "head"),
        *strides("out", "page", "row", "head"),
        Argument("num_rows", "int64_t", "num_pages * page_size * Hkv"),
        Argument("heads", "int32_t"),
        Argument("page_size", "int32_t"),
        Argument("table_width", "int32_t"),
        Argument("longest", "int32_t"),
        Argument("kv_rows", "int32_t"),
        Argument("kv_word", "int32_t"),
        Argument("kv_span_kind", "int32_t"),
        Argument("num_parts", "int32_t"),
        Argument("scale", "float"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterSpec(KernelSpec):
    """Spec of the kernel that adds up per-sequence fp32 parts of dK or dV."""

    family: ClassVar[str] = "kv_scatter"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(SCATTER)
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

"""The rotary embedding kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Access, Dtype, MatrixSize, Switch
from jitattn.spec.kernel_spec import KernelSpec

#: x is [B, L, H, D], or ragged [total, H, D] as one batch of all rows; out is as x, or x itself.
ROTARY: Final = ArgumentStruct(
    "RotaryParams",
    (
        Argument("x", "const void*"),
        Argument("out", "void*"),
        Argument("cos", "const void*", "[table_rows, rotary_dim / 2]"),
        Argument("sin", "const void*"),
        Argument(
            "offsets",
            "const int32_t*",
            "[B]: position of the first row of each sequence; null: offset",
        ),
        Argument(
            "cu_seqlens",
            "const int32_t*",
            "ragged: [B + 1]; null: every sequence is a row of the batch",
        ),
        *strides("x", "batch", "row", "head"),
        Argument("x_stride_column", "int64_t", "1 with Access::kVec16"),
        *strides("out", "batch", "row", "head", "column"),
        Argument("cos_stride", "int64_t", "between rows"),
        Argument("sin_stride", "int64_t"),
        Argument("num_rows", "int64_t", "B * L, or total"),
        Argument("batch", "int32_t", "sequences"),
        Argument("len", "int32_t", "rows of a batch"),
        Argument("heads", "int32_t"),
        Argument("head_dim", "int32_t"),
        Argument("rotary_dim", "int32_t"),
        Argument("table_rows", "int32_t"),
        Argument("offset", "int32_t"),
        Argument(
            "offset_word",
            "int32_t",
            "4-byte words of an index: 1, or 2 of which the low one is read",
        ),
        Argument("cu_word", "int32_t"),
        Argument("units_per_row", "int32_t", "threads for the columns of a row"),
        Argument(
            "head_groups",
            "int32_t",
            "and for its heads: thread g has the heads g, g + head_groups ...",
        ),
        Argument("in_place", "int32_t", "1: what is not turned is not touched"),
        Argument("sign", "float", "1, or -1 to turn back"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec(KernelSpec):
    """Spec of the rotary embedding kernel, also its gradient; dims are run-time parameters."""

    family: ClassVar[str] = "rotary"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(ROTARY)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    table_dtype: Dtype  #: of cos and sin
    interleaved: Switch  #: columns 2i and 2i + 1 are a pair, rather than i and i + rotary_dim / 2
    access: Access
    arch: str

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        del size
        bf16, fp32 = Dtype.BF16, Dtype.FP32
        for dtype, table_dtype in ((bf16, bf16), (fp32, fp32), (bf16, fp32)):
            for interleaved in Switch:
                for access in Access:
                    yield cls(
                        dtype=dtype,
                        table_dtype=table_dtype,
                        interleaved=interleaved,
                        access=access,
                        arch=arch,
                    )

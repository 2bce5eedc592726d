"""The append kernel: writes new keys and values to a KV cache, with rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Access, Dtype, MatrixSize, RotaryStyle
from jitattn.spec.kernel_spec import KernelSpec

#: A cache is [num_pages, page_size, Hkv, D]; one without a block table has a page for every row
#: of the batch. New tokens are [B, num_new, ...], or ragged: [total, ...] with batch stride 0.
APPEND: Final = ArgumentStruct(
    "AppendParams",
    (
        Argument("k", "const void*", "new keys [B, num_new, Hkv, D]"),
        Argument("v", "const void*", "new values [B, num_new, Hkv, Dv]"),
        Argument("q", "const void*", "[B, Lq, Hq, D]; null: not rotated"),
        Argument("cos", "const void*", "[table_rows, rotary_dim / 2]"),
        Argument("sin", "const void*", "likewise"),
        Argument("k_cache", "void*", "[num_pages, page_size, Hkv, D]"),
        Argument("v_cache", "void*", "[num_pages, page_size, Hkv, Dv]"),
        Argument("q_out", "void*", "as q"),
        Argument("kv_stop", "int32_t*", "[B], of stop_word words: rows in use afterwards"),
        Argument("used", "const int32_t*", "[B]: rows in use before; null: used_by_all"),
        Argument(
            "q_start",
            "const int32_t*",
            "ragged tokens: first row of each sequence; null for 0",
        ),
        Argument(
            "q_stop",
            "const int32_t*",
            "ragged tokens: its length, or the row after its last",
        ),
        Argument("block_table", "const int32_t*", "[B, table_width]; null: page b for sequence b"),
        *strides("k", "batch", "row", "head"),
        *strides("v", "batch", "row", "head"),
        *strides("q", "batch", "row", "head"),
        *strides("q_out", "batch", "row", "head"),
        *strides("k_cache", "page", "row", "head"),
        *strides("v_cache", "page", "row", "head"),
        Argument("cos_stride", "int64_t", "between rows"),
        Argument("sin_stride", "int64_t"),
        Argument("table_stride", "int64_t", "between the rows of the block table, in 4-byte words"),
        Argument("num_new", "int32_t", "tokens of a sequence; ragged: the most"),
        Argument("len_q", "int32_t", "queries of a sequence; ragged: those of its new tokens"),
        Argument("heads_q", "int32_t"),
        Argument("heads_kv", "int32_t"),
        Argument("head_dim", "int32_t"),
        Argument("head_dim_v", "int32_t"),
        Argument("rotary_dim", "int32_t"),
        Argument(
            "q_follows",
            "int32_t",
            "1: query i is turned as new token i; 0: all as new token 0",
        ),
        Argument("table_rows", "int32_t", "of cos and sin"),
        Argument("table_width", "int32_t"),
        Argument("num_pages", "int32_t"),
        Argument("page_size", "int32_t"),
        Argument("used_by_all", "int32_t"),
        Argument(
            "used_word",
            "int32_t",
            "4-byte words of an index: 1, or 2 of which the low one is read",
        ),
        Argument("stop_word", "int32_t"),
        Argument("table_word", "int32_t"),
        Argument("q_word", "int32_t"),
        Argument("q_span_kind", "int32_t"),
        Argument("q_rows", "int32_t", "ragged: rows of the tensor"),
        Argument("ctas_per_sequence", "int32_t"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendSpec(KernelSpec):
    """Spec of the append kernel; head dims are run-time parameters."""

    family: ClassVar[str] = "append"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(APPEND)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    table_dtype: Dtype  #: of cos and sin
    rotary: RotaryStyle
    access: Access
    arch: str

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        del size
        bf16, fp32 = Dtype.BF16, Dtype.FP32
        for dtype, table_dtype in ((bf16, bf16), (fp32, fp32), (bf16, fp32)):
            for style in RotaryStyle:
                for access in Access:
                    yield cls(
                        dtype=dtype,
                        table_dtype=table_dtype,
                        rotary=style,
                        access=access,
                        arch=arch,
                    )

"""The quantization kernels of gear 4: channel statistics, then INT8 q and k."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.kernels.matrix import problems_in_8_bits
from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Dtype, MatrixSize, Numerics, Switch
from jitattn.spec.kernel_spec import KernelSpec, Problem

#: Rows per CTA of the channel statistics kernel.
CHUNK_ROWS: Final = 512

#: The common parameters of the quantization kernels (quantize.cuh).
QUANT: Final = ArgumentStruct(
    "QuantParams",
    (
        Argument("q", "const void*", "[B, Lq, Hq, D] or, ragged, [total, Hq, D]; so is k"),
        Argument(
            "k",
            "const void*",
            "[B, Lkv, Hkv, D] or, paged, [num_pages, page_size, Hkv, D]; so is v",
        ),
        Argument("v", "const void*", "null: it stays as it is"),
        Argument(
            "q_out",
            "int8_t*",
            "[B, Hq, Lq, D] or [Hq, total, D], contiguous, as all that follow",
        ),
        Argument(
            "k_out",
            "int8_t*",
            "[B, Hkv, Lkv, D] or [Hkv, total, D]; paged: Lkv is the largest",
        ),
        Argument("v_out", "uint16_t*", "as k_out, fp16"),
        Argument("q_scale", "float*", "[B, Hq, Lq] or [Hq, total]"),
        Argument("k_scale", "float*", "[B, Hkv, ceil(Lkv / 64)]"),
        Argument("along_mean", "float*", "as q_scale: q times the mean of K"),
        Argument("channels", "float*", "[B, Hkv, 2, D]: mean and c"),
        Argument("v_scale", "float*", "[B, Hkv]: undoes that of v_out"),
        Argument("partials", "float*", "[ChunkSlots of q and of k, 3, D], then [ChunkSlots of k]"),
        Argument("arrivals", "int32_t*", "[B, Hkv], all 0, and so left behind"),
        Argument(
            "q_start",
            "const int32_t*",
            "sequences that differ, as FwdSeqParams has them; null if alike",
        ),
        Argument("q_stop", "const int32_t*"),
        Argument("kv_start", "const int32_t*"),
        Argument("kv_stop", "const int32_t*"),
        Argument("block_table", "const int32_t*"),
        Argument("table_stride", "int64_t"),
        *strides("q", "batch", "row", "head"),
        Argument("k_stride_batch", "int64_t", "paged: of a page"),
        *strides("k", "row", "head"),
        *strides("v", "batch", "row", "head"),
        Argument("batch", "int32_t"),
        Argument("len_q", "int32_t", "the largest"),
        Argument("len_kv", "int32_t"),
        Argument("heads_q", "int32_t"),
        Argument("heads_kv", "int32_t"),
        Argument("q_is_flat", "int32_t", "1: [total, Hq, D]"),
        Argument("k_is_flat", "int32_t"),
        Argument("q_word", "int32_t", "from here on as FwdSeqParams has them"),
        Argument("kv_word", "int32_t"),
        Argument("table_word", "int32_t"),
        Argument("q_span_kind", "int32_t"),
        Argument("kv_span_kind", "int32_t"),
        Argument("q_rows", "int32_t"),
        Argument("kv_rows", "int32_t"),
        Argument("num_pages", "uint32_t"),
        Argument("page_size", "int32_t"),
        Argument("page_div_mul", "uint32_t"),
        Argument("page_div_shift", "uint32_t"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStatsSpec(KernelSpec):
    """Spec of the kernel that computes the mean and range of every channel of q and k."""

    family: ClassVar[str] = "channel_stats"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(QUANT)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    head_dim: int
    chunk_rows: int  #: of a CTA
    paged: Switch  #: whether k is paged
    values: Switch  #: whether v is scaled as well
    arch: str

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        return _matrix(0, arch, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSpec(KernelSpec):
    """Spec of the kernel that quantizes q and k to INT8."""

    family: ClassVar[str] = "quantize"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(QUANT)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    head_dim: int
    paged: Switch  #: as in `ChannelStatsSpec`
    values: Switch  #: whether v is converted to fp16, as in `ChannelStatsSpec`
    arch: str

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        return _matrix(1, arch, size)


def quantize_specs(in_8_bits: Problem, arch: str) -> tuple[ChannelStatsSpec, QuantizeSpec]:
    """Return the specs of the kernels that prepare q, k and v for an INT8 problem."""
    paged = Switch.ON if in_8_bits.kv_layout.page_group else Switch.OFF
    dtype, dim = in_8_bits.dtype, in_8_bits.head_dim
    values = Switch.ON if in_8_bits.numerics is Numerics.INT8_F16 else Switch.OFF
    return (
        ChannelStatsSpec(
            dtype=dtype, head_dim=dim, chunk_rows=CHUNK_ROWS, paged=paged, values=values, arch=arch
        ),
        QuantizeSpec(dtype=dtype, head_dim=dim, paged=paged, values=values, arch=arch),
    )


def _matrix(kernel: int, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
    """Yield one of the two kernels for every INT8 problem."""
    if size >= MatrixSize.TUNED:
        for problem in problems_in_8_bits(arch):
            yield quantize_specs(problem, arch)[kernel]

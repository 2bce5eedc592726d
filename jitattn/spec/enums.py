"""Enums of spec fields; the generated header declares those of its kernel in C++.

This module imports nothing of jitattn, and no torch.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum, auto
from typing import Final


class Dtype(StrEnum):
    """Element type of a tensor."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def bytes(self) -> int:
        """Size of one element in bytes."""
        return 4 if self is Dtype.FP32 else 2


class MaskKind(StrEnum):
    """Kind of positional mask; its numbers are runtime parameters."""

    FULL = "full"
    CAUSAL = "causal"
    WINDOW = "window"  #: left and right bounds, and the first keys (sinks)
    LOCAL_STRIDE = "local_stride"  #: causal: local blocks, and every vert_stride-th one before
    FINE_STRIDE = "fine_stride"  #: the same in blocks of 16 or 32, which backward kernels gather
    BLOCK_LISTS = "block_lists"  #: block lists in memory and a window, per head


class Switch(StrEnum):
    """Presence of an optional input."""

    OFF = "off"
    ON = "on"


class BiasKind(StrEnum):
    """Element type of the bias, or none."""

    NONE = "none"
    SAME = "same"  #: dtype of q
    FP32 = "fp32"


class Staging(StrEnum):
    """Staging of a matrix in shared memory, which needs rows of multiples of 16 bytes."""

    OFF = "off"
    ROW = "row"  #: one row for all queries and heads
    MATRIX = "matrix"


class SeqLayout(StrEnum):
    """Layout of the sequences of q, or of k and v."""

    BATCHED = "batched"  #: [B, L, H, D]: every sequence fills its row
    #: A start and a length each, in one tensor [total, H, D] (ragged) or in its batch row (padded).
    RAGGED = "ragged"
    PAGED = "paged"  #: keys only: pages found through a block table
    PAGED16 = "paged16"  #: paged, and every page begins and ends at a multiple of 16 keys

    @property
    def page_group(self) -> int:
        """Number of adjacent keys that share a page; 0 without pages."""
        return {SeqLayout.PAGED: 1, SeqLayout.PAGED16: 16}.get(self, 0)


class Numerics(StrEnum):
    """Precision of products and sums; several gears may share one class."""

    #: 16-bit operands, fp32 accumulators, P rounded to 16 bits (FlashAttention-2's numerics).
    F32_ACC = "f32_acc"
    #: As F32_ACC, but P as the sum of two 16-bit parts, and sums promoted every 64 keys.
    SPLIT_P = "split_p"
    #: fp16 operands, P V in fp16 accumulators, promoted to fp32 every 64 keys.
    F16_ACC = "f16_acc"
    #: INT8 Q Kᵀ with scales; P V as F32_ACC.
    INT8 = "int8"
    #: INT8 Q Kᵀ with scales; P V in fp16 accumulators over up to 2048 keys, for V in fp16.
    INT8_F16 = "int8_f16"
    #: fp32 operands split into two fp16 parts with scales, three MMAs a product.
    F16X3 = "f16x3"
    #: The high fp16 part only, one MMA a product.
    F16X1 = "f16x1"
    #: fp32 operands split into two TF32 parts, three MMAs a product, fp32 accumulators.
    TF32X3 = "tf32x3"
    #: fp32 operands rounded to TF32, fp32 accumulators.
    TF32 = "tf32"

    @property
    def is_quantized(self) -> bool:
        """Whether Q and K are quantized to 8 bits."""
        return self in (Numerics.INT8, Numerics.INT8_F16)

    @property
    def num_parts(self) -> int:
        """Number of fp16 parts of an fp32 operand; 0 if operands are not split."""
        return {Numerics.F16X3: 2, Numerics.F16X1: 1}.get(self, 0)


class Access(StrEnum):
    """Alignment class of q, k, v and out together."""

    #: Every row starts at a multiple of 16 bytes and is a multiple of 16 bytes long.
    VEC16 = "vec16"
    #: Anything else: one element at a time.
    ELEMENT = "element"


class ScoreTarget(StrEnum):
    """Score input whose gradient a kernel computes."""

    MATRIX = "matrix"  #: bias with a row per query
    ROW = "row"  #: bias with one row for all queries
    DISTANCE = "distance"  #: sums by distance key - query, for relative biases and ALiBi slopes


class RotaryStyle(StrEnum):
    """Pairing of columns in a rotary embedding."""

    NONE = "none"
    INTERLEAVED = "interleaved"  #: columns 2i and 2i + 1
    HALF_SPLIT = "half_split"  #: columns i and i + rotary_dim / 2


class RowClass(IntEnum):
    """Class of the number of query rows per KV head, the only length that selects a kernel.

    Rows are counted after GQA packing. The value is the largest number in the class (0: no bound).
    """

    ROWS16 = 16
    ROWS64 = 64
    MANY = 0


class MatrixSize(IntEnum):
    """Size of the compile matrix of a family; each includes the smaller ones."""

    SHORT = auto()  #: one kernel per class of each spec field
    TUNED = auto()  #: also every row of the tile tables, and the head dims of real models
    FULL = auto()  #: also every multiple of 16, in every dtype and row class


#: Allowed values of `tile_rows`, each with its kernel.
TILE_ROWS: Final = {16: RowClass.ROWS16, 64: RowClass.ROWS64, 128: RowClass.MANY}

#: Encoding of starts and stops of sequences: `SpanKind` in attention/spans.cuh.
STOPS, LENGTHS, CUMULATIVE = 0, 1, 2

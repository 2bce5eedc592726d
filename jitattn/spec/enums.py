"""The kinds that specs are made of; the generated header declares those of its kernel in C++.

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
    """Which rule decides what a query sees; its numbers are runtime parameters."""

    FULL = "full"
    CAUSAL = "causal"
    WINDOW = "window"  #: a bound on either side, and the first keys
    LOCAL_STRIDE = "local_stride"  #: causal; blocks nearby, and every so many-th before them
    FINE_STRIDE = "fine_stride"  #: the same in blocks of 16 or 32, which backward kernels gather
    BLOCK_LISTS = "block_lists"  #: lists of blocks in memory, and a window, of each head


class Switch(StrEnum):
    """Whether an optional input is there."""

    OFF = "off"
    ON = "on"


class BiasKind(StrEnum):
    """Element type of the bias, if there is one."""

    NONE = "none"
    SAME = "same"  #: that of q
    FP32 = "fp32"


class Staging(StrEnum):
    """Whether a matrix comes through shared memory; its rows are multiples of 16 bytes then."""

    OFF = "off"
    ROW = "row"  #: all queries and heads have the same row
    MATRIX = "matrix"


class SeqLayout(StrEnum):
    """Where the sequences of q, or of k and v, lie."""

    BATCHED = "batched"  #: [B, L, H, D]: every sequence fills its row
    #: A start and a length each, in one tensor [total, H, D], or in a row of its own (padded).
    RAGGED = "ragged"
    PAGED = "paged"  #: keys only: pages of rows, found through a block table
    PAGED16 = "paged16"  #: the same, where every page begins and ends at a multiple of 16 keys

    @property
    def page_group(self) -> int:
        """Keys that certainly lie in one page; 0 where there are no pages."""
        return {SeqLayout.PAGED: 1, SeqLayout.PAGED16: 16}.get(self, 0)


class Numerics(StrEnum):
    """How products are formed and summed; several gears may share one class."""

    #: 16-bit operands, fp32 accumulators, P rounded to 16 bits (FlashAttention-2's numerics).
    F32_ACC = "f32_acc"
    #: The same, but P as the sum of two 16-bit parts, and sums promoted every 64 keys.
    SPLIT_P = "split_p"
    #: fp16 operands, P V in fp16 accumulators, promoted to fp32 every 64 keys.
    F16_ACC = "f16_acc"
    #: Q and K in 8 bits, with scales; P V as F32_ACC.
    INT8 = "int8"
    #: The same, but P V in fp16 accumulators over up to 2048 keys, for V in fp16.
    INT8_F16 = "int8_f16"
    #: fp32 operands split into two fp16 parts with scales, three MMAs a product.
    F16X3 = "f16x3"
    #: The high of these parts only, one MMA a product.
    F16X1 = "f16x1"
    #: fp32 operands split into two TF32 parts, three MMAs a product, fp32 accumulators.
    TF32X3 = "tf32x3"
    #: fp32 operands rounded to TF32, fp32 accumulators.
    TF32 = "tf32"

    @property
    def is_quantized(self) -> bool:
        """Whether Q and K are in 8 bits."""
        return self in (Numerics.INT8, Numerics.INT8_F16)

    @property
    def num_parts(self) -> int:
        """Fp16 parts of an fp32 operand; 0 where it is none."""
        return {Numerics.F16X3: 2, Numerics.F16X1: 1}.get(self, 0)


class Access(StrEnum):
    """Alignment class of q, k, v and out together."""

    #: Every row starts at a multiple of 16 bytes and is a multiple of 16 bytes long.
    VEC16 = "vec16"
    #: Anything else: one element at a time.
    ELEMENT = "element"


class ScoreTarget(StrEnum):
    """Whose gradient a kernel computes, of what is added to scores."""

    MATRIX = "matrix"  #: a bias with rows of its own
    ROW = "row"  #: a bias whose rows are alike
    DISTANCE = "distance"  #: sums by key - query, for relative biases and ALiBi slopes


class RotaryStyle(StrEnum):
    """Which columns a rotary embedding turns with each other."""

    NONE = "none"
    INTERLEAVED = "interleaved"  #: 2i and 2i + 1
    HALF_SPLIT = "half_split"  #: i and i + rotary_dim / 2


class RowClass(IntEnum):
    """How many rows the queries of a kv head fill: the one length fact that picks a kernel.

    Counted after GQA packing. The value is the largest number of rows of the class (0: no bound).
    """

    ROWS16 = 16
    ROWS64 = 64
    MANY = 0


class MatrixSize(IntEnum):
    """How much of a family the compile matrix holds; a larger one has all of a smaller."""

    SHORT = auto()  #: one kernel for each class of the spec
    TUNED = auto()  #: and every row of the tile tables, and the head dims of real models
    FULL = auto()  #: and every multiple of 16, in every dtype and row class


#: What `tile_rows` may be, and the kernel that it is.
TILE_ROWS: Final = {16: RowClass.ROWS16, 64: RowClass.ROWS64, 128: RowClass.MANY}

#: What a kernel takes starts and stops of sequences for: `SpanKind` in attention/spans.cuh.
STOPS, LENGTHS, CUMULATIVE = 0, 1, 2

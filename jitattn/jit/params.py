"""The by-value parameter struct of each kernel family, packed for a launch.

The field order here is that of `cuda_src/jitattn/params.cuh`: 8-byte fields first, then 4-byte
ones, so that neither side inserts padding. The templates assert the size; a test compares names,
order and types with the header's text.
"""

from __future__ import annotations

import struct
from typing import Final

_POINTER, _INT64, _INT32, _UINT32, _FLOAT = "Q", "q", "i", "I", "f"

FWD_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("q", _POINTER),
    ("k", _POINTER),
    ("v", _POINTER),
    ("out", _POINTER),
    ("lse", _POINTER),
    ("partial_out", _POINTER),
    ("partial_lse", _POINTER),
    ("arrivals", _POINTER),
    ("q_start", _POINTER),
    ("q_stop", _POINTER),
    ("kv_start", _POINTER),
    ("kv_stop", _POINTER),
    ("block_table", _POINTER),
    ("q_stride_batch", _INT64),
    ("q_stride_row", _INT64),
    ("q_stride_head", _INT64),
    ("k_stride_batch", _INT64),
    ("k_stride_row", _INT64),
    ("k_stride_head", _INT64),
    ("v_stride_batch", _INT64),
    ("v_stride_row", _INT64),
    ("v_stride_head", _INT64),
    ("out_stride_batch", _INT64),
    ("out_stride_row", _INT64),
    ("out_stride_head", _INT64),
    ("lse_stride_batch", _INT64),
    ("lse_stride_head", _INT64),
    ("table_stride", _INT64),
    ("batch", _INT32),
    ("len_q", _INT32),
    ("len_kv", _INT32),
    ("heads_q", _INT32),
    ("heads_per_kv", _INT32),
    ("heads_per_tile", _INT32),
    ("num_q_tiles", _INT32),
    ("num_splits", _INT32),
    ("num_slots", _INT32),
    ("diagonal", _INT32),
    ("bottom_right", _INT32),
    ("negate_q", _INT32),
    ("q_word", _INT32),
    ("kv_word", _INT32),
    ("table_word", _INT32),
    ("q_stop_is_length", _INT32),
    ("kv_stop_is_length", _INT32),
    ("q_rows", _INT32),
    ("kv_rows", _INT32),
    ("num_pages", _UINT32),
    ("page_size", _INT32),
    ("page_div_mul", _UINT32),
    ("page_div_shift", _UINT32),
    ("row_div_mul", _UINT32),
    ("row_div_shift", _UINT32),
    ("scale_log2", _FLOAT),
)

MERGE_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("parts", _POINTER),
    ("part_lses", _POINTER),
    ("out", _POINTER),
    ("lse", _POINTER),
    ("part_stride_part", _INT64),
    ("part_stride_batch", _INT64),
    ("part_stride_row", _INT64),
    ("part_stride_head", _INT64),
    ("lse_stride_part", _INT64),
    ("lse_stride_batch", _INT64),
    ("lse_stride_row", _INT64),
    ("lse_stride_head", _INT64),
    ("num_rows", _INT64),
    ("len_q", _INT32),
    ("heads_q", _INT32),
    ("num_parts", _INT32),
    ("reserved", _INT32),
)

FWD_STRUCT: Final = struct.Struct("=" + "".join(code for _, code in FWD_FIELDS))
MERGE_STRUCT: Final = struct.Struct("=" + "".join(code for _, code in MERGE_FIELDS))

FIELDS: Final = {"fwd": FWD_FIELDS, "merge": MERGE_FIELDS}
STRUCTS: Final = {"fwd": FWD_STRUCT, "merge": MERGE_STRUCT}


def fast_divisor(divisor: int) -> tuple[int, int]:
    """Multiplier and shift with n // divisor == (mulhi(n, mul) + n) >> shift for 0 <= n < 2**31.

    Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
    """
    shift = (divisor - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1, shift

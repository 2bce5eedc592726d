"""The by-value parameter struct of each kernel family, packed for a launch.

The field order here is that of `cuda_src/jitattn/params.cuh`: 8-byte fields first, then 4-byte
ones, so that neither side inserts padding (a struct that extends another begins
anew). The templates assert the size; a test compares names,
order and types with the header's text.
"""

from __future__ import annotations

import functools
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
    ("negate_q", _INT32),
    ("row_div_mul", _UINT32),
    ("row_div_shift", _UINT32),
    ("scale_log2", _FLOAT),
)

#: And where sequences differ.
FWD_SEQ_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("q_start", _POINTER),
    ("q_stop", _POINTER),
    ("kv_start", _POINTER),
    ("kv_stop", _POINTER),
    ("block_table", _POINTER),
    ("table_stride", _INT64),
    ("bottom_right", _INT32),
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
)

#: And what is done with scores beside scaling them.
FWD_SCORE_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("bias", _POINTER),
    ("relative_bias", _POINTER),
    ("alibi_slopes", _POINTER),
    ("sinks", _POINTER),
    ("key_padding", _POINTER),
    ("dense", _POINTER),
    ("dropout_state", _POINTER),
    ("bias_stride_batch", _INT64),
    ("bias_stride_head", _INT64),
    ("bias_stride_row", _INT64),
    ("dense_stride_batch", _INT64),
    ("dense_stride_head", _INT64),
    ("dense_stride_row", _INT64),
    ("key_padding_stride", _INT64),
    ("alibi_stride_batch", _INT64),
    ("relative_stride_head", _INT64),
    ("left", _INT32),
    ("keep_first", _INT32),
    ("full_on_decode", _INT32),
    ("relative_reach", _INT32),
    ("bias_is_paired", _INT32),
    ("bias_is_shared", _INT32),
    ("inverse_scale", _FLOAT),
    ("softcap_in", _FLOAT),
    ("softcap_out", _FLOAT),
    ("local_blocks", _INT32),
    ("stride", _INT32),
    ("head_step", _INT32),
    ("head_shift", _INT32),
    ("first_dense", _INT32),
    ("block_log2", _INT32),
    ("neg_shift", _FLOAT),
    ("dropout_threshold", _UINT32),
    ("dropout_scale", _FLOAT),
)

#: And lists of key blocks.
FWD_LIST_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("list_groups", _POINTER),
    ("list_spans", _POINTER),
    ("list_heads", _POINTER),
    ("list_tiles", _INT32),
    ("list_log2", _INT32),
    ("tile_mask", _INT32),
    ("reserved", _INT32),
)

#: What a backward kernel reads beside the parameters of its forward kernel.
BWD_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("d_out", _POINTER),
    ("lse_log2", _POINTER),
    ("delta", _POINTER),
    ("dq_sum", _POINTER),
    ("dk", _POINTER),
    ("dv", _POINTER),
    ("turns", _POINTER),
    ("d_out_stride_batch", _INT64),
    ("d_out_stride_row", _INT64),
    ("d_out_stride_head", _INT64),
    ("dk_stride_batch", _INT64),
    ("dk_stride_row", _INT64),
    ("dk_stride_head", _INT64),
    ("dv_stride_batch", _INT64),
    ("dv_stride_row", _INT64),
    ("dv_stride_head", _INT64),
    ("dq_stride_batch", _INT64),
    ("dq_stride_row", _INT64),
    ("dq_stride_head", _INT64),
    ("stat_stride_batch", _INT64),
    ("stat_stride_head", _INT64),
    ("num_kv_tiles", _INT32),
    ("scale", _FLOAT),
    ("target_batch", _INT32),
    ("target_heads", _INT32),
)

STATS_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("out", _POINTER),
    ("d_out", _POINTER),
    ("lse", _POINTER),
    ("d_lse", _POINTER),
    ("sinks", _POINTER),
    ("lse_log2", _POINTER),
    ("delta", _POINTER),
    ("d_sink", _POINTER),
    ("out_stride_batch", _INT64),
    ("out_stride_row", _INT64),
    ("out_stride_head", _INT64),
    ("d_out_stride_batch", _INT64),
    ("d_out_stride_row", _INT64),
    ("d_out_stride_head", _INT64),
    ("lse_stride_batch", _INT64),
    ("lse_stride_head", _INT64),
    ("lse_stride_row", _INT64),
    ("d_lse_stride_batch", _INT64),
    ("d_lse_stride_head", _INT64),
    ("d_lse_stride_row", _INT64),
    ("num_rows", _INT64),
    ("len_q", _INT32),
    ("heads_q", _INT32),
)

ROUND_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("sum", _POINTER),
    ("dq", _POINTER),
    ("sum_stride_batch", _INT64),
    ("sum_stride_row", _INT64),
    ("sum_stride_head", _INT64),
    ("dq_stride_batch", _INT64),
    ("dq_stride_row", _INT64),
    ("dq_stride_head", _INT64),
    ("num_rows", _INT64),
    ("len_q", _INT32),
    ("heads_q", _INT32),
    ("scale", _FLOAT),
    ("first_position", _INT32),
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

MERGE_GRAD_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("parts", _POINTER),
    ("part_lses", _POINTER),
    ("out", _POINTER),
    ("lse", _POINTER),
    ("d_out", _POINTER),
    ("d_lse", _POINTER),
    ("d_parts", _POINTER),
    ("d_part_lses", _POINTER),
    ("part_stride_part", _INT64),
    ("part_stride_batch", _INT64),
    ("part_stride_row", _INT64),
    ("part_stride_head", _INT64),
    ("num_rows", _INT64),
    ("len_q", _INT32),
    ("heads_q", _INT32),
    ("num_parts", _INT32),
    ("reserved", _INT32),
)

NORM_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("q", _POINTER),
    ("k", _POINTER),
    ("q_out", _POINTER),
    ("k_out", _POINTER),
    ("head_scale", _POINTER),
    ("q_stride_batch", _INT64),
    ("q_stride_row", _INT64),
    ("q_stride_head", _INT64),
    ("k_stride_batch", _INT64),
    ("k_stride_row", _INT64),
    ("k_stride_head", _INT64),
    ("num_slices_q", _INT64),
    ("num_slices_k", _INT64),
    ("len_q", _INT32),
    ("len_k", _INT32),
    ("heads_q", _INT32),
    ("heads_k", _INT32),
    ("scale_stride_row", _INT32),
    ("scale_stride_head", _INT32),
)

NORM_GRAD_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("x", _POINTER),
    ("d_y", _POINTER),
    ("dx", _POINTER),
    ("head_scale", _POINTER),
    ("d_scale", _POINTER),
    ("x_stride_batch", _INT64),
    ("x_stride_row", _INT64),
    ("x_stride_head", _INT64),
    ("num_slices", _INT64),
    ("len", _INT32),
    ("heads", _INT32),
    ("scale_stride_row", _INT32),
    ("scale_stride_head", _INT32),
)

APPEND_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("k", _POINTER),
    ("v", _POINTER),
    ("q", _POINTER),
    ("cos", _POINTER),
    ("sin", _POINTER),
    ("k_cache", _POINTER),
    ("v_cache", _POINTER),
    ("q_out", _POINTER),
    ("kv_stop", _POINTER),
    ("used", _POINTER),
    ("q_start", _POINTER),
    ("q_stop", _POINTER),
    ("block_table", _POINTER),
    ("k_stride_batch", _INT64),
    ("k_stride_row", _INT64),
    ("k_stride_head", _INT64),
    ("v_stride_batch", _INT64),
    ("v_stride_row", _INT64),
    ("v_stride_head", _INT64),
    ("q_stride_batch", _INT64),
    ("q_stride_row", _INT64),
    ("q_stride_head", _INT64),
    ("q_out_stride_batch", _INT64),
    ("q_out_stride_row", _INT64),
    ("q_out_stride_head", _INT64),
    ("k_cache_stride_page", _INT64),
    ("k_cache_stride_row", _INT64),
    ("k_cache_stride_head", _INT64),
    ("v_cache_stride_page", _INT64),
    ("v_cache_stride_row", _INT64),
    ("v_cache_stride_head", _INT64),
    ("cos_stride", _INT64),
    ("sin_stride", _INT64),
    ("table_stride", _INT64),
    ("num_new", _INT32),
    ("len_q", _INT32),
    ("heads_q", _INT32),
    ("heads_kv", _INT32),
    ("head_dim", _INT32),
    ("head_dim_v", _INT32),
    ("rotary_dim", _INT32),
    ("q_follows", _INT32),
    ("table_rows", _INT32),
    ("table_width", _INT32),
    ("num_pages", _INT32),
    ("page_size", _INT32),
    ("used_by_all", _INT32),
    ("used_word", _INT32),
    ("stop_word", _INT32),
    ("table_word", _INT32),
    ("q_word", _INT32),
    ("q_stop_is_length", _INT32),
    ("q_rows", _INT32),
    ("ctas_per_sequence", _INT32),
)

#: And the scales of Q and K in 8 bits, or of fp16 parts of Q, K and V.
SCALE_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("q_scale", _POINTER),
    ("k_scale", _POINTER),
    ("v_scale", _POINTER),
    ("q_scale_stride_batch", _INT64),
    ("q_scale_stride_head", _INT64),
)

#: What a backward kernel for fp16 parts reads at the end.
_OF_D_OUT: Final = (("d_out_scale", _POINTER),)

#: What makes fp16 parts of fp32 operands.
SPLIT_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("q", _POINTER),
    ("k", _POINTER),
    ("v", _POINTER),
    ("d_out", _POINTER),
    ("key_padding", _POINTER),
    ("q_out", _POINTER),
    ("k_out", _POINTER),
    ("v_out", _POINTER),
    ("d_out_out", _POINTER),
    ("q_scale", _POINTER),
    ("k_scale", _POINTER),
    ("v_scale", _POINTER),
    ("d_out_scale", _POINTER),
    ("q_stride_batch", _INT64),
    ("q_stride_row", _INT64),
    ("q_stride_head", _INT64),
    ("k_stride_batch", _INT64),
    ("k_stride_row", _INT64),
    ("k_stride_head", _INT64),
    ("v_stride_batch", _INT64),
    ("v_stride_row", _INT64),
    ("v_stride_head", _INT64),
    ("d_out_stride_batch", _INT64),
    ("d_out_stride_row", _INT64),
    ("d_out_stride_head", _INT64),
    ("key_padding_stride", _INT64),
    ("batch", _INT32),
    ("len_q", _INT32),
    ("len_kv", _INT32),
    ("heads_q", _INT32),
    ("heads_kv", _INT32),
    ("reserved", _INT32),
)

#: The kernels that make these read the same.
QUANT_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("q", _POINTER),
    ("k", _POINTER),
    ("v", _POINTER),
    ("q_out", _POINTER),
    ("k_out", _POINTER),
    ("v_out", _POINTER),
    ("q_scale", _POINTER),
    ("k_scale", _POINTER),
    ("along_mean", _POINTER),
    ("channels", _POINTER),
    ("v_scale", _POINTER),
    ("partials", _POINTER),
    ("arrivals", _POINTER),
    ("q_start", _POINTER),
    ("q_stop", _POINTER),
    ("kv_start", _POINTER),
    ("kv_stop", _POINTER),
    ("block_table", _POINTER),
    ("table_stride", _INT64),
    ("q_stride_batch", _INT64),
    ("q_stride_row", _INT64),
    ("q_stride_head", _INT64),
    ("k_stride_batch", _INT64),
    ("k_stride_row", _INT64),
    ("k_stride_head", _INT64),
    ("v_stride_batch", _INT64),
    ("v_stride_row", _INT64),
    ("v_stride_head", _INT64),
    ("batch", _INT32),
    ("len_q", _INT32),
    ("len_kv", _INT32),
    ("heads_q", _INT32),
    ("heads_kv", _INT32),
    ("q_is_flat", _INT32),
    ("k_is_flat", _INT32),
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
)

_FWD: Final = {
    "fwd": FWD_FIELDS,
    "fwd_seq": FWD_FIELDS + FWD_SEQ_FIELDS,
    "fwd_score": FWD_FIELDS + FWD_SEQ_FIELDS + FWD_SCORE_FIELDS,
    "fwd_list": FWD_FIELDS + FWD_SEQ_FIELDS + FWD_SCORE_FIELDS + FWD_LIST_FIELDS,
}
#: The fields of every struct, by the name that `KernelSpec.params` gives it.
FIELDS: Final = {
    **_FWD,
    **{name.replace("fwd", "bwd"): fields + BWD_FIELDS for name, fields in _FWD.items()},
    **{f"{name}_scaled": fields + SCALE_FIELDS for name, fields in _FWD.items()},
    **{
        f"{name.replace('fwd', 'bwd')}_scaled": fields + SCALE_FIELDS + BWD_FIELDS + _OF_D_OUT
        for name, fields in _FWD.items()
    },
    "quant": QUANT_FIELDS,
    "split": SPLIT_FIELDS,
    "stats": STATS_FIELDS,
    "round": ROUND_FIELDS,
    "merge": MERGE_FIELDS,
    "merge_grad": MERGE_GRAD_FIELDS,
    "append": APPEND_FIELDS,
    "norm": NORM_FIELDS,
    "norm_grad": NORM_GRAD_FIELDS,
}
STRUCTS: Final = {
    name: struct.Struct("=" + "".join(code for _, code in fields))
    for name, fields in FIELDS.items()
}


@functools.cache
def divisor(number: int) -> tuple[int, int]:
    """Return `fast_divisor`, remembered."""
    return fast_divisor(number)


def fast_divisor(divisor: int) -> tuple[int, int]:
    """Multiplier and shift with n // divisor == (mulhi(n, mul) + n) >> shift for 0 <= n < 2**31.

    Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
    """
    shift = (divisor - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1, shift

// The by-value parameter struct of each kernel family. Field order as in jitattn/jit/params.py:
// 8-byte fields first, so that neither side pads. Strides are in elements.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

struct FwdParams {
  const void* q;       // [B, Lq, Hq, D]
  const void* k;       // [B, Lkv, Hkv, D]
  const void* v;       // [B, Lkv, Hkv, Dv]
  void* out;           // [B, Lq, Hq, Dv]
  float* lse;          // [B, Hq, Lq], contiguous; may be null
  float* partial_out;  // [num_splits, B, Hq, Lq, Dv], contiguous; null if num_splits == 1
  float* partial_lse;  // [num_splits, B, Hq, Lq], contiguous; null if num_splits == 1
  int64_t q_stride_batch;
  int64_t q_stride_row;
  int64_t q_stride_head;
  int64_t k_stride_batch;
  int64_t k_stride_row;
  int64_t k_stride_head;
  int64_t v_stride_batch;
  int64_t v_stride_row;
  int64_t v_stride_head;
  int64_t out_stride_batch;
  int64_t out_stride_row;
  int64_t out_stride_head;
  int32_t batch;
  int32_t len_q;
  int32_t len_kv;
  int32_t heads_q;
  int32_t heads_per_kv;    // Hq / Hkv
  int32_t heads_per_tile;  // query heads packed into the rows of a tile: 1 or heads_per_kv
  int32_t num_q_tiles;     // ceil(len_q * heads_per_tile / block_q)
  int32_t num_splits;      // CTAs that share the keys of one query tile
  int32_t diagonal;        // causal: query i sees keys <= i + diagonal
  int32_t negate_q;        // 1 if the scale is negative: q changes sign, the scale does not
  uint32_t row_div_mul;    // row / heads_per_tile = (mulhi(row, mul) + row) >> shift
  uint32_t row_div_shift;
  float scale_log2;  // |scale| * log2(e), never 0
  int32_t reserved;  // keeps the size a multiple of 8
};

struct MergeParams {
  const float* partial_out;  // [num_splits, B, Hq, Lq, Dv], contiguous
  const float* partial_lse;  // [num_splits, B, Hq, Lq], contiguous
  void* out;                 // [B, Lq, Hq, Dv]
  float* lse;                // [B, Hq, Lq], contiguous; may be null
  int64_t out_stride_batch;
  int64_t out_stride_row;
  int64_t out_stride_head;
  int64_t num_rows;  // B * Hq * Lq
  int32_t len_q;
  int32_t heads_q;
  int32_t num_splits;
  int32_t reserved;  // keeps the size a multiple of 8
};

}  // namespace jitattn

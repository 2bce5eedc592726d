// The by-value parameter struct of each kernel family. Field order as in jitattn/jit/params.py:
// 8-byte fields first, so that neither side pads. Strides are in elements.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

// A ragged q is [total, Hq, D] (batch stride 0) or [B, Lq, Hq, D]; so are k and v. A paged k is
// [num_pages, page_size, Hkv, D], and its batch stride is that of a page.
struct FwdParams {
  const void* q;               // [B, Lq, Hq, D]
  const void* k;               // [B, Lkv, Hkv, D]
  const void* v;               // [B, Lkv, Hkv, Dv]
  void* out;                   // [B, Lq, Hq, Dv]
  float* lse;                  // [B, Hq, Lq] or, ragged, [Hq, total]; may be null
  float* partial_out;          // [num_items, head_tiles, block_q, Dv], contiguous; null: no splits
  float* partial_lse;          // [num_items, head_tiles, block_q], contiguous
  int32_t* arrivals;           // [num_items, head_tiles], all 0, and so left behind
  const int32_t* q_start;      // ragged: first row of each sequence; null for 0
  const int32_t* q_stop;       // ragged: its length, or the row after its last
  const int32_t* kv_start;     // the same of the keys
  const int32_t* kv_stop;      // paged as well
  const int32_t* block_table;  // paged: [B, max_pages], the page of every page_size keys
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
  int64_t lse_stride_batch;
  int64_t lse_stride_head;
  int64_t table_stride;  // between the rows of the block table, in 4-byte words
  int32_t batch;
  int32_t len_q;   // ragged: the largest
  int32_t len_kv;  // ragged and paged: the largest
  int32_t heads_q;
  int32_t heads_per_kv;    // Hq / Hkv
  int32_t heads_per_tile;  // query heads packed into the rows of a tile: 1 or heads_per_kv
  int32_t num_q_tiles;     // ceil(len_q * heads_per_tile / block_q)
  int32_t num_splits;      // CTAs that share the keys of one query tile; 0: balanced on the device
  int32_t num_slots;       // balanced: CTAs that the GPU holds at a time
  int32_t diagonal;        // causal: query i sees keys <= i + diagonal
  int32_t bottom_right;    // 1: and Lkv - Lq of each sequence is added to the diagonal
  int32_t negate_q;        // 1 if the scale is negative: q changes sign, the scale does not
  int32_t q_word;          // 4-byte words of an index of q: 1, or 2 of which the low one is read
  int32_t kv_word;
  int32_t table_word;
  int32_t q_stop_is_length;
  int32_t kv_stop_is_length;
  int32_t q_rows;  // ragged: rows of the tensor, of which no index leads out
  int32_t kv_rows;
  uint32_t num_pages;
  int32_t page_size;
  uint32_t page_div_mul;  // key / page_size = (mulhi(key, mul) + key) >> shift
  uint32_t page_div_shift;
  uint32_t row_div_mul;  // row / heads_per_tile, likewise
  uint32_t row_div_shift;
  float scale_log2;  // |scale| * log2(e), never 0
};

struct MergeParams {
  const void* parts;       // [num_parts, B, Lq, Hq, Dv]
  const float* part_lses;  // [num_parts, B, Hq, Lq]
  void* out;               // [B, Hq, Lq, Dv], contiguous
  float* lse;              // [B, Hq, Lq], contiguous
  int64_t part_stride_part;
  int64_t part_stride_batch;
  int64_t part_stride_row;
  int64_t part_stride_head;
  int64_t lse_stride_part;
  int64_t lse_stride_batch;
  int64_t lse_stride_row;
  int64_t lse_stride_head;
  int64_t num_rows;  // B * Hq * Lq
  int32_t len_q;
  int32_t heads_q;
  int32_t num_parts;
  int32_t reserved;  // keeps the size a multiple of 8
};

}  // namespace jitattn

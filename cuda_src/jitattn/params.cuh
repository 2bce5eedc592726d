// The by-value parameter struct of each kernel family. Field order as in jitattn/spec/params.py:
// 8-byte fields first, so that neither side pads. Strides are in elements.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

// What every forward kernel reads.
struct FwdParams {
  const void* q;       // [B, Lq, Hq, D]
  const void* k;       // [B, Lkv, Hkv, D]
  const void* v;       // [B, Lkv, Hkv, Dv]
  void* out;           // [B, Lq, Hq, Dv]
  float* lse;          // [B, Hq, Lq] or, ragged, [Hq, total]; may be null
  float* partial_out;  // [num_items, head_tiles, block_q, Dv], contiguous; null: no splits
  float* partial_lse;  // [num_items, head_tiles, block_q], contiguous
  int32_t* arrivals;   // [num_items, head_tiles], all 0, and so left behind
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
  int32_t negate_q;        // 1 if the scale is negative: q changes sign, the scale does not
  uint32_t row_div_mul;    // row / heads_per_tile = (mulhi(row, mul) + row) >> shift
  uint32_t row_div_shift;
  float scale_log2;  // |scale| * log2(e), never 0
};

// And where sequences differ. A ragged q is [total, Hq, D] (batch stride 0) or [B, Lq, Hq, D]; so
// are k and v. A paged k is [num_pages, page_size, Hkv, D], and its batch stride is that of a page.
struct FwdSeqParams : FwdParams {
  const int32_t* q_start;   // ragged: first row of each sequence; null for 0
  const int32_t* q_stop;    // ragged: its length, or the row after its last
  const int32_t* kv_start;  // the same of the keys
  const int32_t* kv_stop;   // paged as well
  // paged: [B, max_pages], the page of every page_size keys. ragged: [B], the row of the batch of k
  // and v that is the sequence's; null: its own.
  const int32_t* block_table;
  int64_t table_stride;  // between the rows of the block table, in 4-byte words
  int32_t bottom_right;  // 1: Lkv - Lq of each sequence is added to the diagonal
  int32_t q_word;        // 4-byte words of an index of q: 1, or 2 of which the low one is read
  int32_t kv_word;
  int32_t table_word;
  int32_t q_span_kind;  // SpanKind: what q_start and q_stop stand for
  int32_t kv_span_kind;
  int32_t q_rows;      // ragged: rows of the tensor, of which no index leads out
  int32_t kv_rows;     // paged: of all pages that a sequence has room for
  uint32_t num_pages;  // ragged: batch of k and v
  int32_t page_size;
  uint32_t page_div_mul;  // key / page_size, as row_div
  uint32_t page_div_shift;
};

// And what is done with scores beside scaling them. Strides in elements; 0 where a dimension is 1.
struct FwdScoreParams : FwdSeqParams {
  const void* bias;              // [B, Hq, Lq, Lkv]
  const float* relative_bias;    // [Hq, 2 * relative_reach + 1], by key - query
  const float* alibi_slopes;     // [B, Hq]
  const float* sinks;            // [Hq]
  const uint8_t* key_padding;    // [B, Lkv], nonzero = attend
  const uint8_t* dense;          // [B, Hq, Lq, Lkv], nonzero = attend
  const int64_t* dropout_state;  // [2]: seed and offset
  int64_t bias_stride_batch;
  int64_t bias_stride_head;
  int64_t bias_stride_row;
  int64_t dense_stride_batch;
  int64_t dense_stride_head;
  int64_t dense_stride_row;
  int64_t key_padding_stride;
  int64_t alibi_stride_batch;
  int64_t relative_stride_head;
  int32_t left;            // window: query i sees keys >= i + left, Lkv - Lq added as to diagonal,
  int32_t keep_first;      // and the first ones
  int32_t full_on_decode;  // 1: no bound on the left for sequences with one query
  int32_t relative_reach;
  int32_t bias_is_paired;  // 1: two neighbours may be read in one access
  int32_t bias_is_shared;  // 1: all rows of a tile have the same
  float inverse_scale;     // 1 / |scale|
  float softcap_in;        // 2 log2(e) |scale| / softcap
  float softcap_out;       // softcap / |scale|
  int32_t local_blocks;    // local + stride: blocks up to a query's own that it sees
  int32_t stride;          // and of those before, one in so many
  int32_t head_step;       // kv head h is offset by h * head_step + head_shift
  int32_t head_shift;
  int32_t first_dense;         // kv heads from this one on see every block
  int32_t block_log2;          // keys of a block
  float neg_shift;             // fixed shift: what stands for the maximum of every row, negated
  uint32_t dropout_threshold;  // p * 2^16
  float dropout_scale;         // 1 / (1 - p)
};

// And lists of key blocks. A group is 16 keys; the queries of a list are 8 cells or 16, of 8 each.
struct FwdListParams : FwdScoreParams {
  const int2* list_groups;  // (group, whether cell i sees its keys 0 to 7: bit i; 8 to 15: 16 + i)
  const int2* list_spans;   // [num_lists, list_tiles]: first group of a list, and their number
  // [2, Hq]: 2 list + 1 if positions below 0 see nothing, right, left, keep_first; and for one
  // query alone
  const int4* list_heads;
  int32_t list_tiles;  // spans of a list: one for every 2^list_log2 positions
  int32_t list_log2;
  int32_t tile_mask;  // positions of a query tile, a power of two, less 1
  int32_t reserved;   // keeps the size a multiple of 8
};

// And the scales of operands that were made for the kernel, and are contiguous: Q and K in 8 bits,
// or all three as fp16 parts, [B, H, L, parts, D]. Backward kernels have q_scale as d_out_scale.
template <class Fwd>
struct ScaledParams : Fwd {
  const float* q_scale;  // as the LSE
  const float* k_scale;  // [B, Hkv, ceil(Lkv / 64)]
  const float* v_scale;  // as k_scale; with Q and K in 8 bits [B, Hkv], or null
  int64_t q_scale_stride_batch;
  int64_t q_scale_stride_head;
};

// What makes fp16 parts (split_halves.cuh).
struct SplitParams {
  const float* q;              // [B, Lq, Hq, D]
  const float* k;              // [B, Lkv, Hkv, D]
  const float* v;              // [B, Lkv, Hkv, Dv]
  const float* d_out;          // [B, Lq, Hq, Dv]; null: of a forward kernel
  const uint8_t* key_padding;  // [B, Lkv], nonzero = attend; null: all. What is hidden becomes 0
  uint16_t* q_out;             // [B, Hq, Lq, parts, D], contiguous, as all that follow
  uint16_t* k_out;             // [B, Hkv, Lkv, parts, D]
  uint16_t* v_out;             // [B, Hkv, Lkv, parts, Dv]
  uint16_t* d_out_out;         // [B, Hq, Lq, parts, Dv]
  float* q_scale;              // [B, Hq, Lq]; with dO as d_out_scale
  float* k_scale;              // [B, Hkv, ceil(Lkv / 64)]
  float* v_scale;              // [B, Hkv, ceil(Lkv / 64)]
  float* d_out_scale;          // [B, Hq, ceil(Lq / 64)]
  int64_t q_stride_batch;
  int64_t q_stride_row;
  int64_t q_stride_head;
  int64_t k_stride_batch;
  int64_t k_stride_row;
  int64_t k_stride_head;
  int64_t v_stride_batch;
  int64_t v_stride_row;
  int64_t v_stride_head;
  int64_t d_out_stride_batch;
  int64_t d_out_stride_row;
  int64_t d_out_stride_head;
  int64_t key_padding_stride;
  int32_t batch;
  int32_t len_q;
  int32_t len_kv;
  int32_t heads_q;
  int32_t heads_kv;
  int32_t reserved;  // keeps the size a multiple of 8
};

// What makes them (quantize.cuh).
struct QuantParams {
  const void* q;           // [B, Lq, Hq, D] or, ragged, [total, Hq, D]; so is k
  const void* k;           // [B, Lkv, Hkv, D] or, paged, [num_pages, page_size, Hkv, D]; so is v
  const void* v;           // null: it stays as it is
  int8_t* q_out;           // [B, Hq, Lq, D] or [Hq, total, D], contiguous, as all that follow
  int8_t* k_out;           // [B, Hkv, Lkv, D] or [Hkv, total, D]; paged: Lkv is the largest
  uint16_t* v_out;         // as k_out, fp16
  float* q_scale;          // [B, Hq, Lq] or [Hq, total]
  float* k_scale;          // [B, Hkv, ceil(Lkv / 64)]
  float* along_mean;       // as q_scale: q times the mean of K
  float* channels;         // [B, Hkv, 2, D]: mean and c
  float* v_scale;          // [B, Hkv]: undoes that of v_out
  float* partials;         // [ChunkSlots of q and of k, 3, D], then [ChunkSlots of k]
  int32_t* arrivals;       // [B, Hkv], all 0, and so left behind
  const int32_t* q_start;  // sequences that differ, as FwdSeqParams has them; null if alike
  const int32_t* q_stop;
  const int32_t* kv_start;
  const int32_t* kv_stop;
  const int32_t* block_table;
  int64_t table_stride;
  int64_t q_stride_batch;
  int64_t q_stride_row;
  int64_t q_stride_head;
  int64_t k_stride_batch;  // paged: of a page
  int64_t k_stride_row;
  int64_t k_stride_head;
  int64_t v_stride_batch;
  int64_t v_stride_row;
  int64_t v_stride_head;
  int32_t batch;
  int32_t len_q;  // the largest
  int32_t len_kv;
  int32_t heads_q;
  int32_t heads_kv;
  int32_t q_is_flat;  // 1: [total, Hq, D]
  int32_t k_is_flat;
  int32_t q_word;  // from here on as FwdSeqParams has them
  int32_t kv_word;
  int32_t table_word;
  int32_t q_span_kind;
  int32_t kv_span_kind;
  int32_t q_rows;
  int32_t kv_rows;
  uint32_t num_pages;
  int32_t page_size;
  uint32_t page_div_mul;
  uint32_t page_div_shift;
};

// What a backward kernel reads beside the parameters of its forward kernel, of which it leaves out
// `out`, `lse` and those of splits.
template <class Fwd>
struct BwdParams : Fwd {
  const void* d_out;       // [B, Lq, Hq, Dv], dtype of q
  const float* lse_log2;   // [B, Hq, Lq] or, ragged, [Hq, total]: log2(e) LSE; +inf for blind rows
  const float* delta;      // likewise: rowsum(dO * O) - dLSE
  const float* sink_rest;  // likewise: part of the weights that a sink leaves to the keys
  const float* d_out_scale;  // [2]: by which dO and delta are scaled, and its inverse; null: 1
  float* dq_sum;             // dQ / scale, zeroed; in fragment order, or as q. bwd_scores.cuh: the
                             // gradient of the bias; or, zeroed, [2, B, Hq, Lq + Lkv]
  void* dk;                  // [B, Lkv, Hkv, D]; in parts: fp32, and unscaled
  void* dv;                  // [B, Lkv, Hkv, Dv]; likewise
  int32_t* turns;            // [B, Hq, num_q_tiles], zeroed: key blocks that have added; null: any
  int64_t d_out_stride_batch;
  int64_t d_out_stride_row;
  int64_t d_out_stride_head;
  int64_t dk_stride_batch;
  int64_t dk_stride_row;
  int64_t dk_stride_head;
  int64_t dv_stride_batch;
  int64_t dv_stride_row;
  int64_t dv_stride_head;
  int64_t dk_stride_split;
  int64_t dv_stride_split;
  int64_t dq_stride_batch;  // of dq_sum as q; in fragment order, of batch and head
  int64_t dq_stride_row;
  int64_t dq_stride_head;
  int64_t stat_stride_batch;  // of lse_log2 and delta
  int64_t stat_stride_head;
  int32_t num_kv_tiles;  // of the longest sequence
  int32_t num_q_splits;  // CTAs that share the query tiles of a key block
  int32_t in_parts;      // dk and dv are fp32 parts of splits and sequences: 1 written, 2 added to
  int32_t first_q_tile;  // of this launch
  int32_t end_q_tile;
  float scale;           // |scale|
  int32_t target_batch;  // bwd_scores.cuh: batches and heads of the gradient, 1 or B and 1 or Hq
  int32_t target_heads;
};

// And where operands are fp16 parts.
template <class Fwd>
struct BwdScaledParams : BwdParams<Fwd> {
  const float* d_out_part_scale;  // [B, Hq, ceil(Lq / 64)], contiguous
};

// Row statistics for the backward kernels. A row is a query of one head.
struct StatsParams {
  const void* out;           // [B, Lq, Hq, Dv]
  const void* d_out;         // [B, Lq, Hq, Dv]
  const float* lse;          // [B, Hq, Lq]
  const float* d_lse;        // [B, Hq, Lq]; null: 0
  const float* sinks;        // [Hq]; null: none
  const float* d_out_scale;  // by which delta is scaled; null: 1
  float* lse_log2;           // [B, Hq, Lq], contiguous
  float* delta;              // [B, Hq, Lq], contiguous
  float* sink_rest;          // [B, Hq, Lq], contiguous: part of the weights that the sink leaves
  float* d_sink;             // [B, Hq, Lq], contiguous: what each row adds to dsinks
  int64_t out_stride_batch;
  int64_t out_stride_row;
  int64_t out_stride_head;
  int64_t d_out_stride_batch;
  int64_t d_out_stride_row;
  int64_t d_out_stride_head;
  int64_t lse_stride_batch;
  int64_t lse_stride_head;
  int64_t lse_stride_row;
  int64_t d_lse_stride_batch;
  int64_t d_lse_stride_head;
  int64_t d_lse_stride_row;
  int64_t num_rows;  // B * Lq * Hq
  int32_t len_q;
  int32_t heads_q;
};

// From the sums of dQ in fragment order to dQ. A row is a query of one head.
struct RoundParams {
  const float* sum;      // [B, Hq, ceil(Lq / block_q) * block_q, Dpad]
  void* dq;              // [B, Lq, Hq, D], contiguous and aligned to 16 bytes
  const float* unscale;  // multiplies the result; null: 1
  int64_t sum_stride_batch;
  int64_t sum_stride_head;
  int64_t dq_stride_batch;
  int64_t dq_stride_row;
  int64_t dq_stride_head;
  int64_t num_rows;  // B * Lq * Hq
  int32_t len_q;
  int32_t heads_q;
  float scale;
  int32_t first_position;  // rows of the first tile before query 0
};

// From fp32 parts of a gradient, in its own order, to the gradient.
struct SumPartsParams {
  const float* parts;    // [num_parts, B, length, H, D]
  void* out;             // [B, length, H, D]
  const float* unscale;  // multiplies the result; null: 1
  int64_t part_stride_part;
  int64_t part_stride_batch;
  int64_t part_stride_row;
  int64_t part_stride_head;
  int64_t out_stride_batch;
  int64_t out_stride_row;
  int64_t out_stride_head;
  int64_t num_rows;  // B * length * H
  int32_t length;
  int32_t heads;
  int32_t num_parts;
  float scale;
};

// From the parts of dK or dV by sequences to rows of memory that sequences may share: pages, or
// rows of the batch that they name. An entry is a place of the block table.
struct ScatterParams {
  const float* sum;         // [num_parts, B, longest, Hkv, D]
  void* out;                // [num_pages, page_size, Hkv, D]
  const float* unscale;     // multiplies the result; null: 1
  const int64_t* entries;   // [B * table_width]: places of the table, in the order of their pages
  const int64_t* bounds;    // [num_pages + 1]: first entry of each page
  const int32_t* kv_start;  // as FwdSeqParams
  const int32_t* kv_stop;
  int64_t sum_stride_part;
  int64_t sum_stride_batch;
  int64_t sum_stride_row;
  int64_t sum_stride_head;
  int64_t out_stride_page;
  int64_t out_stride_row;
  int64_t out_stride_head;
  int64_t num_rows;  // num_pages * page_size * Hkv
  int32_t heads;
  int32_t page_size;
  int32_t table_width;
  int32_t longest;
  int32_t kv_rows;
  int32_t kv_word;
  int32_t kv_span_kind;
  int32_t num_parts;
  float scale;
  int32_t reserved;  // keeps the size a multiple of 8
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

// The gradient of that. What belongs to a part is [num_parts, B, Hq, Lq, ...] and contiguous but
// for the parts themselves, [num_parts, B, Lq, Hq, Dv].
struct MergeGradParams {
  const void* parts;
  const float* part_lses;  // contiguous
  const void* out;         // [B, Hq, Lq, Dv], contiguous
  const float* lse;        // [B, Hq, Lq], contiguous
  const void* d_out;       // as out
  const float* d_lse;      // as lse; null: 0
  void* d_parts;           // contiguous
  float* d_part_lses;      // contiguous
  int64_t part_stride_part;
  int64_t part_stride_batch;
  int64_t part_stride_row;
  int64_t part_stride_head;
  int64_t num_rows;  // B * Hq * Lq
  int32_t len_q;
  int32_t heads_q;
  int32_t num_parts;
  int32_t reserved;  // keeps the size a multiple of 8
};

// q is [B, Lq, Hq, D] and so is k; the results are contiguous. A slice is a group of a vector.
struct NormParams {
  const void* q;
  const void* k;
  void* q_out;
  void* k_out;
  const float* head_scale;  // [Hq], for q; null: 1
  int64_t q_stride_batch;
  int64_t q_stride_row;
  int64_t q_stride_head;
  int64_t k_stride_batch;
  int64_t k_stride_row;
  int64_t k_stride_head;
  int64_t num_slices_q;
  int64_t num_slices_k;
  int32_t len_q;
  int32_t len_k;
  int32_t heads_q;
  int32_t heads_k;
  int32_t scale_stride_row;   // 1 where "rows" are heads, [B, Hq, Lq, D],
  int32_t scale_stride_head;  // and 0 here then
};

// The gradient of one of the two; a slice as above, the gradient and dx contiguous.
struct NormGradParams {
  const void* x;    // [B, L, H, D]
  const void* d_y;  // of the normalised
  void* dx;
  const float* head_scale;  // [H]; null: 1
  float* d_scale;  // [num_slices]: what each adds to the gradient of its scale; may be null
  int64_t x_stride_batch;
  int64_t x_stride_row;
  int64_t x_stride_head;
  int64_t num_slices;
  int32_t len;
  int32_t heads;
  int32_t scale_stride_row;
  int32_t scale_stride_head;
};

// A cache is [num_pages, page_size, Hkv, D]; one without a block table has a page for every row of
// the batch. New tokens are [B, num_new, ...], or ragged: [total, ...] with batch stride 0.
struct AppendParams {
  const void* k;               // new keys [B, num_new, Hkv, D]
  const void* v;               // new values [B, num_new, Hkv, Dv]
  const void* q;               // [B, Lq, Hq, D]; null: not rotated
  const void* cos;             // [table_rows, rotary_dim / 2]
  const void* sin;             // likewise
  void* k_cache;               // [num_pages, page_size, Hkv, D]
  void* v_cache;               // [num_pages, page_size, Hkv, Dv]
  void* q_out;                 // as q
  int32_t* kv_stop;            // [B], of stop_word words: rows in use afterwards
  const int32_t* used;         // [B]: rows in use before; null: used_by_all
  const int32_t* q_start;      // ragged tokens: first row of each sequence; null for 0
  const int32_t* q_stop;       // ragged tokens: its length, or the row after its last
  const int32_t* block_table;  // [B, table_width]; null: page b for sequence b
  int64_t k_stride_batch;
  int64_t k_stride_row;
  int64_t k_stride_head;
  int64_t v_stride_batch;
  int64_t v_stride_row;
  int64_t v_stride_head;
  int64_t q_stride_batch;
  int64_t q_stride_row;
  int64_t q_stride_head;
  int64_t q_out_stride_batch;
  int64_t q_out_stride_row;
  int64_t q_out_stride_head;
  int64_t k_cache_stride_page;
  int64_t k_cache_stride_row;
  int64_t k_cache_stride_head;
  int64_t v_cache_stride_page;
  int64_t v_cache_stride_row;
  int64_t v_cache_stride_head;
  int64_t cos_stride;  // between rows
  int64_t sin_stride;
  int64_t table_stride;  // between the rows of the block table, in 4-byte words
  int32_t num_new;       // tokens of a sequence; ragged: the most
  int32_t len_q;         // queries of a sequence; ragged: those of its new tokens
  int32_t heads_q;
  int32_t heads_kv;
  int32_t head_dim;
  int32_t head_dim_v;
  int32_t rotary_dim;
  int32_t q_follows;   // 1: query i is turned as new token i; 0: all as new token 0
  int32_t table_rows;  // of cos and sin
  int32_t table_width;
  int32_t num_pages;
  int32_t page_size;
  int32_t used_by_all;
  int32_t used_word;  // 4-byte words of an index: 1, or 2 of which the low one is read
  int32_t stop_word;
  int32_t table_word;
  int32_t q_word;
  int32_t q_span_kind;
  int32_t q_rows;  // ragged: rows of the tensor
  int32_t ctas_per_sequence;
};

// x is [B, L, H, D], or ragged [total, H, D] as one batch of all rows; out is as x, or x itself.
struct RotaryParams {
  const void* x;
  void* out;
  const void* cos;  // [table_rows, rotary_dim / 2]
  const void* sin;
  const int32_t* offsets;     // [B]: position of the first row of each sequence; null: offset
  const int32_t* cu_seqlens;  // ragged: [B + 1]; null: every sequence is a row of the batch
  int64_t x_stride_batch;
  int64_t x_stride_row;
  int64_t x_stride_head;
  int64_t x_stride_column;  // 1 with Access::kVec16
  int64_t out_stride_batch;
  int64_t out_stride_row;
  int64_t out_stride_head;
  int64_t out_stride_column;
  int64_t cos_stride;  // between rows
  int64_t sin_stride;
  int64_t num_rows;  // B * L, or total
  int32_t batch;     // sequences
  int32_t len;       // rows of a batch
  int32_t heads;
  int32_t head_dim;
  int32_t rotary_dim;
  int32_t table_rows;
  int32_t offset;
  int32_t offset_word;  // 4-byte words of an index: 1, or 2 of which the low one is read
  int32_t cu_word;
  int32_t units_per_row;  // threads for the columns of a row
  int32_t head_groups;    // and for its heads: thread g has the heads g, g + head_groups ...
  int32_t in_place;       // 1: what is not turned is not touched
  float sign;             // 1, or -1 to turn back
  int32_t reserved;       // keeps the size a multiple of 8
};

}  // namespace jitattn

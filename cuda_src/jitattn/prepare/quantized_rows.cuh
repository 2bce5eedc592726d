// Rows, work items and result layout shared by the INT8 quantization kernels (quantize.cuh).
#pragma once

#include "jitattn/attention/spans.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

constexpr int kQuantKeys = 64;

// CTAs per multiprocessor of the quantize kernel; one more would spill.
template <class Spec>
constexpr int kQuantCtas = Spec::kHeadDim <= 128 && Spec::kValues == Switch::kOff ? 3 : 2;

// The rows of a CTA.
struct QuantWork {
  bool is_k;
  int head;
  int batch;
  int block;
  Span q;  // the sequence's queries
  Span kv;

  __device__ const Span& own() const { return is_k ? kv : q; }
};

// Maps a CTA to its rows: blocks of the longest sequence fastest, then heads; q before k.
__device__ __forceinline__ QuantWork quant_work(const QuantParams& params, int rows_each,
                                                int64_t cta_idx) {
  const int blocks_q = ceil_div(params.len_q, rows_each);
  const int blocks_k = ceil_div(params.len_kv, rows_each);
  const int64_t num_q = static_cast<int64_t>(blocks_q) * params.heads_q * params.batch;
  int64_t rest = cta_idx;
  const bool is_k = rest >= num_q;
  if (is_k) rest -= num_q;
  const int blocks = is_k ? blocks_k : blocks_q, heads = is_k ? params.heads_kv : params.heads_q;
  const int block = static_cast<int>(rest % blocks);
  rest /= blocks;
  const int batch = static_cast<int>(rest / heads);
  Span q = {0, params.len_q}, kv = {0, params.len_kv};
  if (params.q_stop != nullptr) {
    q = load_span(params.q_start, params.q_stop, batch, params.q_word, params.q_span_kind,
                  params.len_q, params.q_rows);
  }
  if (params.kv_stop != nullptr) {
    kv = load_span(params.kv_start, params.kv_stop, batch, params.kv_word, params.kv_span_kind,
                   params.len_kv, params.kv_rows);
  }
  return {is_k, static_cast<int>(rest % heads), batch, block, q, kv};
}

// Layout of the chunk results of q or of k. For flat tensors a head has slots for the chunks of all
// rows plus one per sequence, so that no two sequences share a slot: the size depends on the
// tensor, not on the longest sequence.
struct ChunkSlots {
  int heads;
  int chunk_rows;
  bool is_flat;
  int64_t of_head;  // slots of a head; of all sequences, if flat
  int64_t count;

  __device__ ChunkSlots(const QuantParams& params, bool is_k, int chunk_rows)
      : heads(is_k ? params.heads_kv : params.heads_q),
        chunk_rows(chunk_rows),
        is_flat((is_k ? params.k_is_flat : params.q_is_flat) != 0) {
    const int len = is_k ? params.len_kv : params.len_q;
    const int rows = is_k ? params.kv_rows : params.q_rows;
    of_head = is_flat ? rows / chunk_rows + params.batch : ceil_div(len, chunk_rows);
    count = of_head * heads * (is_flat ? 1 : params.batch);
  }
  __device__ int64_t first(int batch, int head, const Span& span) const {
    if (is_flat) return of_head * head + span.start / chunk_rows + batch;
    return of_head * (static_cast<int64_t>(batch) * heads + head);
  }
};

// Returns the power of two by which V is divided so that its maximum is in [1, 2), or up to 4 where
// the scale would be subnormal.
__device__ __forceinline__ float scale_of_values(float most) {
  const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;
  return __int_as_float((min_of(126, max_of(-126, exponent)) + 127) << 23);
}

// Eight neighbouring channels of a row; kDim / 8 threads share a row.
template <class Spec>
struct QuantRow {
  using Element = Scalar<Spec::kDtype>;
  static constexpr int kDim = Spec::kHeadDim;
  static constexpr int kLanes = kDim / 8;
  static constexpr int kRowsPerPass = Spec::kNumThreads / kLanes;
  static constexpr bool kIsPaged = Spec::kPaged == Switch::kOn;
  static_assert((kLanes & (kLanes - 1)) == 0 && kLanes <= 32, "lanes of a row are in one warp");

  // Loads a row of q or k, whichever the CTA has; or of v, which is laid out as k is.
  template <bool kIsOfV = false>
  __device__ static Vec16 load(const QuantParams& params, const QuantWork& work, int row,
                               int lane) {
    int outer = work.batch, inner = work.own().start + row;
    if constexpr (kIsPaged) {
      if (work.is_k) {
        const int idx = divide(inner, params.page_div_mul, params.page_div_shift);
        const int page = load_index(params.block_table + work.batch * params.table_stride, idx,
                                    params.table_word);
        // A page index beyond the pages is replaced by 0: no other memory is read.
        outer = static_cast<uint32_t>(page) < params.num_pages ? page : 0;
        inner -= idx * params.page_size;
      }
    }
    const void* g_first = work.is_k ? params.k : params.q;
    int64_t stride_batch = work.is_k ? params.k_stride_batch : params.q_stride_batch;
    int64_t stride_row = work.is_k ? params.k_stride_row : params.q_stride_row;
    int64_t stride_head = work.is_k ? params.k_stride_head : params.q_stride_head;
    if constexpr (kIsOfV) {
      g_first = params.v;
      stride_batch = params.v_stride_batch;
      stride_row = params.v_stride_row;
      stride_head = params.v_stride_head;
    }
    const uint16_t* g_row = static_cast<const uint16_t*>(g_first) + outer * stride_batch +
                            inner * stride_row + work.head * stride_head;
    return *reinterpret_cast<const Vec16*>(g_row + lane * 8);
  }

  __device__ static void widen(float (&x)[8], const Vec16& loaded) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = loaded.word[i / 2];
      x[i] = Element::load(static_cast<uint16_t>(i % 2 ? word >> 16 : word));
    }
  }
};

}  // namespace jitattn

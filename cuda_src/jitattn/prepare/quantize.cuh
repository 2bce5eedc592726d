// What        8-bit Q and K for the forward kernel (tile/mma_int8.cuh), and for sums in fp16
//             (tile/parked_sums.cuh) V in fp16, scaled.
//
// Math        q k = (c q) ((k - mean) / c) + q mean, channel by channel, where `mean` is that of K
//             over the sequence: it adds the same to all scores of a query, which the softmax does
//             not see, and the LSE gets back. c = sqrt(max|k - mean| / max|q|) makes the channels
//             of both as even as it can. Then a row of Q is rounded to 8 bits with a scale of its
//             own, kQuantKeys rows of K with one. A head of V has a power of two.
//
// Paper       Zhang et al., "SageAttention", arXiv:2410.02367 (the mean of K; scales by blocks);
//             Xiao et al., "SmoothQuant", arXiv:2211.10438 (c). We differ: both, scales by rows of
//             Q, and everything from one pass over Q and K.
//
// Work split  channel_stats: a CTA has kChunkRows rows of a head, of q or of k; the last one of a
// kv
//             head makes mean and c of what all have left. quantize: a CTA has kQuantKeys rows.
//             CTAs of k have those of v, too.
//
// Pages       K is read through the block table, and written as if batched, from the first key of
//             each sequence on: a page that several share has as many results, each with the mean
//             and the scales of its sequence. Rows of no sequence are not read.
#pragma once

#include "jitattn/attention/spans.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

constexpr int kQuantKeys = 64;

// CTAs of a multiprocessor that round; one more would spill.
template <class Spec>
constexpr int kQuantCtas = Spec::kHeadDim <= 128 && Spec::kValues == Switch::kOff ? 3 : 2;

// Which rows a CTA has.
struct QuantWork {
  bool is_k;
  int head;
  int batch;
  int block;
  Span q;  // of the sequence
  Span kv;

  __device__ const Span& own() const { return is_k ? kv : q; }
};

// CTAs: blocks of the longest sequence fastest, then heads, of q and then of k.
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

// Where the results of chunks of q or of k lie. Sequences of one row have room for the chunks of
// that row and for one each, so that none shares a chunk: room goes with the tensor, not with the
// longest of its sequences.
struct ChunkSlots {
  int heads;
  int chunk_rows;
  bool is_flat;
  int64_t of_head;  // of all sequences, if flat
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

// What V is divided by so that the largest becomes 1 … 2, or up to 4 where that would be no normal
// number: a power of two.
__device__ __forceinline__ float scale_of_values(float most) {
  const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;
  return __int_as_float((min_of(126, max_of(-126, exponent)) + 127) << 23);
}

__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// Eight neighbouring channels of a row; lanes of kDim / 8 threads share a row.
template <class Spec>
struct QuantRow {
  using Element = Scalar<Spec::kDtype>;
  static constexpr int kDim = Spec::kHeadDim;
  static constexpr int kLanes = kDim / 8;
  static constexpr int kRowsPerPass = Spec::kNumThreads / kLanes;
  static constexpr bool kIsPaged = Spec::kPaged == Switch::kOn;
  static_assert((kLanes & (kLanes - 1)) == 0 && kLanes <= 32, "lanes of a row are in one warp");

  // Of q or k, as the CTA has them; or of v, which lies as k does.
  template <bool kIsOfV = false>
  __device__ static Vec16 load(const QuantParams& params, const QuantWork& work, int row,
                               int lane) {
    int outer = work.batch, inner = work.own().start + row;
    if constexpr (kIsPaged) {
      if (work.is_k) {
        const int idx = divide(inner, params.page_div_mul, params.page_div_shift);
        const int page = load_index(params.block_table + work.batch * params.table_stride, idx,
                                    params.table_word);
        // Whatever the table says, no page is read but those that exist.
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

// Leaves sum, least and largest of every channel: partials [ChunkSlots of q | of k, 3, D]; then the
// largest of v, [ChunkSlots of k].
template <class Spec>
__device__ __forceinline__ void channel_stats(const QuantParams& params) {
  using Row = QuantRow<Spec>;
  constexpr int kDim = Row::kDim, kLanes = Row::kLanes, kRowsPerPass = Row::kRowsPerPass;
  static_assert(sizeof(QuantParams) == Spec::kParamsBytes,
                "host and device disagree on QuantParams");
  static_assert(Spec::kSmemBytes == 0 && Spec::kNumThreads >= kDim);
  __shared__ float s_stats[3][kRowsPerPass][kDim];
  __shared__ bool s_is_last;
  constexpr bool kLooksAtV = Spec::kValues == Switch::kOn;

  const QuantWork work = quant_work(params, Spec::kChunkRows, blockIdx.x);
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const int len = work.own().length;
  if (work.block * Spec::kChunkRows >= len) return;  // of a sequence that is shorter than others
  const int chunks_q = ceil_div(work.q.length, Spec::kChunkRows);
  const int chunks_k = ceil_div(work.kv.length, Spec::kChunkRows);
  // ---- This chunk
  float sum[8], least[8], largest[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum[i] = 0.f;
    least[i] = infinity();
    largest[i] = -infinity();
  }
  const int end = min_of(len, (work.block + 1) * Spec::kChunkRows);
  constexpr int kAhead = 4;  // rows in flight
  for (int row = work.block * Spec::kChunkRows + first; row < end; row += kAhead * kRowsPerPass) {
    Vec16 loaded[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      // Again the last row, which changes neither the least nor the largest.
      loaded[j] = Row::load(params, work, min_of(row + j * kRowsPerPass, end - 1), lane);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const float counts = row + j * kRowsPerPass < end ? 1.f : 0.f;
      float x[8];
      Row::widen(x, loaded[j]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum[i] = fmaf(counts, x[i], sum[i]);
        least[i] = fminf(least[i], x[i]);
        largest[i] = fmaxf(largest[i], x[i]);
      }
    }
  }
  float most_v = 0.f;
  if (kLooksAtV && work.is_k) {
    for (int row = work.block * Spec::kChunkRows + first; row < end; row += kAhead * kRowsPerPass) {
      Vec16 loaded[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int own = min_of(row + j * kRowsPerPass, end - 1);
        loaded[j] = Row::template load<true>(params, work, own, lane);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        float x[8];
        Row::widen(x, loaded[j]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float size = fabsf(x[i]);
          most_v = fmaxf(most_v, size < infinity() ? size : 0.f);  // others scale as they like
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    s_stats[0][first][lane * 8 + i] = sum[i];
    s_stats[1][first][lane * 8 + i] = least[i];
    s_stats[2][first][lane * 8 + i] = largest[i];
  }
  __syncthreads();
  const ChunkSlots slots_q(params, false, Spec::kChunkRows);
  const ChunkSlots slots_k(params, true, Spec::kChunkRows);
  const int64_t chunk = work.is_k ? slots_q.count + slots_k.first(work.batch, work.head, work.kv)
                                  : slots_q.first(work.batch, work.head, work.q);
  float* g_chunk = params.partials + (chunk + work.block) * (3 * kDim);
  const int column = threadIdx.x;
  // Of v: behind those of k.
  float* g_most_v = params.partials + (slots_q.count + slots_k.count) * (3 * kDim);
  if constexpr (kLooksAtV) {
    __shared__ float s_most_v[Spec::kNumThreads / 32];
    most_v = largest_of_warp(most_v);
    if (threadIdx.x % 32 == 0) s_most_v[threadIdx.x / 32] = most_v;
    __syncthreads();
    if (work.is_k && threadIdx.x == 0) {
      for (const float other : s_most_v) most_v = fmaxf(most_v, other);
      g_most_v[chunk - slots_q.count + work.block] = most_v;
    }
  }
  if (column < kDim) {
    float total = 0.f, low = infinity(), high = -infinity();
    for (int i = 0; i < kRowsPerPass; ++i) {
      total += s_stats[0][i][column];
      low = fminf(low, s_stats[1][i][column]);
      high = fmaxf(high, s_stats[2][i][column]);
    }
    g_chunk[column] = total;
    g_chunk[kDim + column] = low;
    g_chunk[2 * kDim + column] = high;
  }

  // ---- The last one of a kv head: mean and c
  const int group = params.heads_q / params.heads_kv;
  const int kv_head = work.is_k ? work.head : work.head / group;
  const int64_t of_head = static_cast<int64_t>(work.batch) * params.heads_kv + kv_head;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int others = chunks_k + group * chunks_q - 1;
    s_is_last = atomicAdd(params.arrivals + of_head, 1) == others;
    if (s_is_last) params.arrivals[of_head] = 0;  // as it was found
  }
  __syncthreads();
  if (!s_is_last) return;
  __threadfence();
  const int64_t chunk_k = slots_q.count + slots_k.first(work.batch, kv_head, work.kv);
  if (kLooksAtV && threadIdx.x < 32) {
    float most = 0.f;
    for (int i = threadIdx.x; i < chunks_k; i += 32) {
      most = fmaxf(most, __ldcg(g_most_v + (chunk_k - slots_q.count) + i));
    }
    most = largest_of_warp(most);
    if (threadIdx.x == 0) params.v_scale[of_head] = scale_of_values(most);
  }
  if (column >= kDim) return;
  const float* g_k = params.partials + chunk_k * (3 * kDim) + column;
  float total = 0.f, low = infinity(), high = -infinity();
#pragma unroll 8
  for (int i = 0; i < chunks_k; ++i, g_k += 3 * kDim) {
    total += __ldcg(g_k);
    low = fminf(low, __ldcg(g_k + kDim));
    high = fmaxf(high, __ldcg(g_k + 2 * kDim));
  }
  const float mean = chunks_k == 0 ? 0.f : total / static_cast<float>(work.kv.length);
  const float most_k = fmaxf(high - mean, mean - low);
  float most_q = 0.f;
  for (int head = 0; head < group; ++head) {
    const int64_t chunk_q = slots_q.first(work.batch, kv_head * group + head, work.q);
    const float* g_q = params.partials + chunk_q * (3 * kDim) + column;
#pragma unroll 8
    for (int i = 0; i < chunks_q; ++i, g_q += 3 * kDim) {
      most_q = fmaxf(most_q, fmaxf(__ldcg(g_q + 2 * kDim), -__ldcg(g_q + kDim)));
    }
  }
  // A channel that is 0 on one side counts for nothing, whatever c.
  const bool is_used = most_k > 0.f && most_q > 0.f;
  float* g_channels = params.channels + of_head * (2 * kDim) + column;
  g_channels[0] = mean;
  g_channels[kDim] = is_used ? sqrtf(most_k / most_q) : 1.f;
}

// The rows of V that belong to those of K of a CTA, which are written from first_out on.
template <class Spec>
__device__ __forceinline__ void round_values(const QuantParams& params, const QuantWork& work,
                                             int64_t first_out) {
  using Row = QuantRow<Spec>;
  constexpr int kPasses = kQuantKeys / Row::kRowsPerPass;
  const int lane = threadIdx.x % Row::kLanes, first = threadIdx.x / Row::kLanes;
  const int64_t of_head = static_cast<int64_t>(work.batch) * params.heads_kv + work.head;
  const float down = __ldg(params.v_scale + of_head);
  const float up = __int_as_float((254 << 23) - __float_as_int(down));  // 1 / down
  Vec16 loaded[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = work.block * kQuantKeys + first + pass * Row::kRowsPerPass;
    loaded[pass] = Row::template load<true>(params, work, min_of(row, work.kv.length - 1), lane);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = work.block * kQuantKeys + first + pass * Row::kRowsPerPass;
    if (row >= work.kv.length) continue;
    float x[8];
    Row::widen(x, loaded[pass]);
    Vec16 rounded;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rounded.word[i] = ptx::pack_f16x2(x[2 * i] * up, x[2 * i + 1] * up);
    }
    uint16_t* g_row = params.v_out + (first_out + row) * Row::kDim;
    *reinterpret_cast<Vec16*>(g_row + lane * 8) = rounded;
  }
}

template <class Spec>
__device__ __forceinline__ void quantize(const QuantParams& params) {
  using Row = QuantRow<Spec>;
  constexpr int kDim = Row::kDim, kLanes = Row::kLanes, kRowsPerPass = Row::kRowsPerPass;
  constexpr int kPasses = kQuantKeys / kRowsPerPass;
  static_assert(kPasses * kRowsPerPass == kQuantKeys, "no row of the next block");
  constexpr float kLargest = 127.f;
  // c has made both alike: where one is below this, scores are 0 for every purpose. And the product
  // of two scales must not be 0, with which a hidden score, -inf, would become NaN.
  constexpr float kLeast = 1e-10f;
  static_assert(sizeof(QuantParams) == Spec::kParamsBytes,
                "host and device disagree on QuantParams");
  static_assert(Spec::kSmemBytes == 0);
  __shared__ float s_most[Spec::kNumThreads / 32];

  // The last ones first: they are those that the cache still holds.
  const QuantWork work = quant_work(params, kQuantKeys, gridDim.x - 1 - blockIdx.x);
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const bool is_in_pages = Row::kIsPaged && work.is_k;
  const int len = work.own().length, start = is_in_pages ? 0 : work.own().start;
  if (work.block * kQuantKeys >= len) return;  // of a sequence that is shorter than others
  const int heads = work.is_k ? params.heads_kv : params.heads_q;
  const int group = params.heads_q / params.heads_kv;
  const int kv_head = work.is_k ? work.head : work.head / group;
  const float* g_channels =
      params.channels +
      (static_cast<int64_t>(work.batch) * params.heads_kv + kv_head) * (2 * kDim) + lane * 8;
  // All rows are under way at once; past the end it is the last one again, which has been counted.
  Vec16 loaded[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = work.block * kQuantKeys + first + pass * kRowsPerPass;
    loaded[pass] = Row::load(params, work, min_of(row, len - 1), lane);
  }
  float mean[8], factor[8];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 means = __ldg(reinterpret_cast<const float4*>(g_channels + i));
    const float4 factors = __ldg(reinterpret_cast<const float4*>(g_channels + kDim + i));
    const float of_mean[4] = {means.x, means.y, means.z, means.w};
    const float of_factor[4] = {factors.x, factors.y, factors.z, factors.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      mean[i + j] = of_mean[j];
      factor[i + j] = work.is_k ? ptx::rcp_approx(of_factor[j]) : of_factor[j];
    }
  }
  // A number of channel i of q, c q, or of k, (k - mean) / c. Made twice, as registers are dear.
  auto even = [&](float x, int i) { return (work.is_k ? x - mean[i] : x) * factor[i]; };
  // Rows before those of this sequence and head, in what is written.
  const bool is_flat = work.is_k ? params.k_is_flat : params.q_is_flat;
  const int64_t rows_of_head = is_in_pages ? params.len_kv
                               : work.is_k ? params.kv_rows
                                           : params.q_rows;
  const int64_t first_out =
      ((is_flat ? 0 : static_cast<int64_t>(work.batch) * heads) + work.head) * rows_of_head + start;
  int8_t* g_out = (work.is_k ? params.k_out : params.q_out) + first_out * kDim;

  float most[kPasses];
  float most_of_all = 0.f;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = work.block * kQuantKeys + first + pass * kRowsPerPass;
    const bool exists = row < len;
    most[pass] = 0.f;
    float along_mean = 0.f, x[8];
    Row::widen(x, loaded[pass]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!work.is_k) along_mean = fmaf(x[i], mean[i], along_mean);
      most[pass] = fmaxf(most[pass], fabsf(even(x[i], i)));
    }
    most_of_all = fmaxf(most_of_all, most[pass]);
    if (work.is_k) continue;
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      most[pass] = fmaxf(most[pass], __shfl_xor_sync(0xffffffffu, most[pass], mask));
      along_mean += __shfl_xor_sync(0xffffffffu, along_mean, mask);
    }
    if (exists && lane == 0) {
      params.q_scale[first_out + row] = fmaxf(most[pass], kLeast) / kLargest;
      // Without keys the LSE is -inf, whatever q.
      params.along_mean[first_out + row] = work.kv.length == 0 ? 0.f : along_mean;
    }
  }
  if (work.is_k) {
    most_of_all = largest_of_warp(most_of_all);
    if (threadIdx.x % 32 == 0) s_most[threadIdx.x / 32] = most_of_all;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Spec::kNumThreads / 32; ++i) most_of_all = fmaxf(most_of_all, s_most[i]);
    if (threadIdx.x == 0) {
      const int64_t of_head = static_cast<int64_t>(work.batch) * heads + work.head;
      params.k_scale[of_head * ceil_div(params.len_kv, kQuantKeys) + work.block] =
          fmaxf(most_of_all, kLeast) / kLargest;
    }
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = work.block * kQuantKeys + first + pass * kRowsPerPass;
    if (row >= len) continue;
    const float inverse = kLargest / fmaxf(work.is_k ? most_of_all : most[pass], kLeast);
    float x[8];
    Row::widen(x, loaded[pass]);
    uint32_t packed[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      packed[i / 4] |= (ptx::cvt_s8(even(x[i], i) * inverse) & 0xffu) << (i % 4 * 8);
    }
    *reinterpret_cast<uint2*>(g_out + static_cast<int64_t>(row) * kDim + lane * 8) =
        make_uint2(packed[0], packed[1]);
  }
  if constexpr (Spec::kValues == Switch::kOn) {
    if (work.is_k) round_values<Spec>(params, work, first_out);
  }
}

}  // namespace jitattn

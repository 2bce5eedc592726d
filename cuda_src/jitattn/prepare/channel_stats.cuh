// Computes the sum, minimum and maximum of each channel of Q and K for quantization (quantize.cuh).
#pragma once

#include "jitattn/attention/spans.cuh"
#include "jitattn/prepare/quantized_rows.cuh"
#include "jitattn/prepare/reduce.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Sum, minimum and maximum of a thread's eight channels over its rows of a chunk.
template <class Spec>
struct ChannelSums {
  using Row = QuantRow<Spec>;
  static constexpr int kAhead = 4;  // rows in flight

  float sum[8];
  float least[8];
  float largest[8];

  // Sums every kRowsPerPass-th row from `first` on, before `end`.
  __device__ ChannelSums(const QuantParams& params, const QuantWork& work, int first, int end,
                         int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[i] = 0.f;
      least[i] = infinity();
      largest[i] = -infinity();
    }
    for (int row = first; row < end; row += kAhead * Row::kRowsPerPass) {
      Vec16 loaded[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        // Past the end, the last row is loaded again, which changes neither minimum nor maximum.
        loaded[j] = Row::load(params, work, min_of(row + j * Row::kRowsPerPass, end - 1), lane);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const float counts = row + j * Row::kRowsPerPass < end ? 1.f : 0.f;
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
  }
};

// Returns the largest finite magnitude of V in the same rows, over a thread's eight channels.
template <class Spec>
__device__ __forceinline__ float largest_of_values(const QuantParams& params, const QuantWork& work,
                                                   int first, int end, int lane) {
  using Row = QuantRow<Spec>;
  constexpr int kAhead = ChannelSums<Spec>::kAhead;
  float most = 0.f;
  for (int row = first; row < end; row += kAhead * Row::kRowsPerPass) {
    Vec16 loaded[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int own = min_of(row + j * Row::kRowsPerPass, end - 1);
      loaded[j] = Row::template load<true>(params, work, own, lane);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      float x[8];
      Row::widen(x, loaded[j]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float size = fabsf(x[i]);
        most = fmaxf(most, size < infinity() ? size : 0.f);  // non-finite values are ignored
      }
    }
  }
  return most;
}

// Location of the per-chunk results: partials [ChunkSlots of q | of k, 3, D], then the maxima of V,
// [ChunkSlots of k].
template <class Spec>
struct ChannelPartials {
  static constexpr int kSize = 3 * QuantRow<Spec>::kDim;  // per chunk

  const ChunkSlots slots_q;
  const ChunkSlots slots_k;
  float* const g_first_most_v;

  __device__ explicit ChannelPartials(const QuantParams& params)
      : slots_q(params, false, Spec::kChunkRows),
        slots_k(params, true, Spec::kChunkRows),
        g_first_most_v(params.partials + (slots_q.count + slots_k.count) * kSize) {}

  // Index of the first chunk of a head of a sequence.
  __device__ int64_t first_q(int batch, int head, const Span& q) const {
    return slots_q.first(batch, head, q);
  }
  __device__ int64_t first_k(int batch, int head, const Span& kv) const {
    return slots_q.count + slots_k.first(batch, head, kv);
  }

  // Address of the maximum of V of a chunk of k.
  __device__ float* g_most_v(int64_t chunk) const {
    return g_first_most_v + (chunk - slots_q.count);
  }
};

// Reduces the chunks of a kv head and its query heads: the mean of K and c of each channel, in the
// channel's thread; the scale of V, in the first warp.
template <class Spec>
__device__ __forceinline__ void finish_head(const QuantParams& params, const QuantWork& work,
                                            const ChannelPartials<Spec>& partials, int64_t of_head,
                                            int kv_head, int group, int chunks_q, int chunks_k) {
  constexpr int kDim = QuantRow<Spec>::kDim;
  const int column = threadIdx.x;
  const int64_t chunk_k = partials.first_k(work.batch, kv_head, work.kv);
  if (Spec::kValues == Switch::kOn && threadIdx.x < 32) {
    float most = 0.f;
    for (int i = threadIdx.x; i < chunks_k; i += 32) {
      most = fmaxf(most, __ldcg(partials.g_most_v(chunk_k) + i));
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
    const int64_t chunk_q = partials.first_q(work.batch, kv_head * group + head, work.q);
    const float* g_q = params.partials + chunk_q * (3 * kDim) + column;
#pragma unroll 8
    for (int i = 0; i < chunks_q; ++i, g_q += 3 * kDim) {
      most_q = fmaxf(most_q, fmaxf(__ldcg(g_q + 2 * kDim), -__ldcg(g_q + kDim)));
    }
  }
  // A channel that is 0 on one side contributes nothing, whatever c is.
  const bool is_used = most_k > 0.f && most_q > 0.f;
  float* g_channels = params.channels + of_head * (2 * kDim) + column;
  g_channels[0] = mean;
  g_channels[kDim] = is_used ? sqrtf(most_k / most_q) : 1.f;
}

// Writes the sum, minimum and maximum of every channel of a chunk, and the maximum of V.
template <class Spec>
__device__ __forceinline__ void channel_stats(const QuantParams& params) {
  using Row = QuantRow<Spec>;
  constexpr int kDim = Row::kDim, kRowsPerPass = Row::kRowsPerPass;
  static_assert(sizeof(QuantParams) == Spec::kParamsBytes,
                "host and device disagree on QuantParams");
  static_assert(Spec::kSmemBytes == 0 && Spec::kNumThreads >= kDim);
  __shared__ float s_stats[3][kRowsPerPass][kDim];
  __shared__ bool s_is_last;
  constexpr bool kLooksAtV = Spec::kValues == Switch::kOn;

  // ---- This chunk
  const QuantWork work = quant_work(params, Spec::kChunkRows, blockIdx.x);
  const int lane = threadIdx.x % Row::kLanes, first = threadIdx.x / Row::kLanes;
  const int len = work.own().length, first_row = work.block * Spec::kChunkRows + first;
  if (work.block * Spec::kChunkRows >= len) return;  // beyond the end of this sequence
  const int chunks_q = ceil_div(work.q.length, Spec::kChunkRows);
  const int chunks_k = ceil_div(work.kv.length, Spec::kChunkRows);
  const int end = min_of(len, (work.block + 1) * Spec::kChunkRows);
  const ChannelSums<Spec> own(params, work, first_row, end, lane);
  float most_v = 0.f;
  if (kLooksAtV && work.is_k) {
    most_v = largest_of_values<Spec>(params, work, first_row, end, lane);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    s_stats[0][first][lane * 8 + i] = own.sum[i];
    s_stats[1][first][lane * 8 + i] = own.least[i];
    s_stats[2][first][lane * 8 + i] = own.largest[i];
  }
  __syncthreads();
  const ChannelPartials<Spec> partials(params);
  const int64_t chunk = work.is_k ? partials.first_k(work.batch, work.head, work.kv)
                                  : partials.first_q(work.batch, work.head, work.q);
  float* g_chunk = params.partials + (chunk + work.block) * (3 * kDim);
  const int column = threadIdx.x;
  if constexpr (kLooksAtV) {
    __shared__ float s_most_v[Spec::kNumThreads / 32];
    most_v = largest_of_warp(most_v);
    if (threadIdx.x % 32 == 0) s_most_v[threadIdx.x / 32] = most_v;
    __syncthreads();
    if (work.is_k && threadIdx.x == 0) {
      for (const float other : s_most_v) most_v = fmaxf(most_v, other);
      partials.g_most_v(chunk)[work.block] = most_v;
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

  // ---- The last CTA of a kv head
  const int group = params.heads_q / params.heads_kv;
  const int kv_head = work.is_k ? work.head : work.head / group;
  const int64_t of_head = static_cast<int64_t>(work.batch) * params.heads_kv + kv_head;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int others = chunks_k + group * chunks_q - 1;
    s_is_last = atomicAdd(params.arrivals + of_head, 1) == others;
    if (s_is_last) params.arrivals[of_head] = 0;  // reset for the next launch
  }
  __syncthreads();
  if (!s_is_last) return;
  __threadfence();
  finish_head<Spec>(params, work, partials, of_head, kv_head, group, chunks_q, chunks_k);
}

}  // namespace jitattn

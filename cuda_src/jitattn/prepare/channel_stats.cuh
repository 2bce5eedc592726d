// Sum, minimum and maximum of each channel of Q and K, for quantization (quantize.cuh).
#pragma once

#include "jitattn/attention/spans.cuh"
#include "jitattn/prepare/quantized_rows.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

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

}  // namespace jitattn

// Kernel      Quantizes Q and K to INT8 for the forward kernel (tile/mma/int8.cuh); for fp16
//             accumulation (tile/two_level_accumulator.cuh) also converts V to scaled fp16.
//
// Math        q k = (c q) ((k - mean) / c) + q mean, channel by channel. `mean` is the mean of K
//             over the sequence: its term is equal for all scores of a query, so that the softmax
//             does not change, and it is added back to the LSE. c = sqrt(max|k - mean| / max|q|)
//             balances the channels of both. Then each row of Q is rounded to 8 bits with its own
//             scale, and each kQuantKeys rows of K with one. V has one power-of-two scale per head.
//
// Paper       Zhang et al., "SageAttention", arXiv:2410.02367 (the mean of K; scales by blocks);
//             Xiao et al., "SmoothQuant", arXiv:2211.10438 (c). We differ: both are combined, Q has
//             a scale per row, and all statistics come from one pass over Q and K.
//
// Work split  channel_stats: a CTA has kChunkRows rows of a head of q or k; the last one of a kv
//             head reduces all chunks to mean and c. quantize: a CTA has kQuantKeys rows. CTAs of k
//             also process the same rows of v.
//
// Pages       K is read through the block table, and written as if batched, from the first key of
//             each sequence on: a page shared by several sequences is written once for each, with
//             the mean and the scales of that sequence. Rows of no sequence are not read.
#pragma once

#include "jitattn/prepare/quantized_rows.cuh"
#include "jitattn/prepare/reduce.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Converts the rows of V that belong to a CTA's rows of K to scaled fp16, from row first_out on.
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

// Mean and c of a thread's eight channels.
template <class Spec>
struct EvenChannels {
  using Row = QuantRow<Spec>;

  const bool is_k;
  float mean[8];
  float factor[8];

  __device__ EvenChannels(const QuantParams& params, const QuantWork& work, int kv_head, int lane)
      : is_k(work.is_k) {
    const float* g_channels =
        params.channels +
        (static_cast<int64_t>(work.batch) * params.heads_kv + kv_head) * (2 * Row::kDim) + lane * 8;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 means = __ldg(reinterpret_cast<const float4*>(g_channels + i));
      const float4 factors = __ldg(reinterpret_cast<const float4*>(g_channels + Row::kDim + i));
      const float of_mean[4] = {means.x, means.y, means.z, means.w};
      const float of_factor[4] = {factors.x, factors.y, factors.z, factors.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        mean[i + j] = of_mean[j];
        factor[i + j] = is_k ? ptx::rcp_approx(of_factor[j]) : of_factor[j];
      }
    }
  }

  // Returns channel i of q, c q, or of k, (k - mean) / c. Computed twice, to save registers.
  __device__ float operator()(float x, int i) const { return (is_k ? x - mean[i] : x) * factor[i]; }

  // Stores the channels of a row as 8 bits; `inverse` is 1 / the row's scale.
  __device__ void store(int8_t* g_out, const Vec16& loaded, float inverse) const {
    float x[8];
    Row::widen(x, loaded);
    uint32_t packed[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      packed[i / 4] |= (ptx::cvt_s8((*this)(x[i], i) * inverse) & 0xffu) << (i % 4 * 8);
    }
    *reinterpret_cast<uint2*>(g_out) = make_uint2(packed[0], packed[1]);
  }
};

// Number of output rows before those of a CTA's sequence and head.
template <class Spec>
__device__ __forceinline__ int64_t first_row_out(const QuantParams& params, const QuantWork& work) {
  const bool is_in_pages = QuantRow<Spec>::kIsPaged && work.is_k;
  const bool is_flat = work.is_k ? params.k_is_flat : params.q_is_flat;
  const int heads = work.is_k ? params.heads_kv : params.heads_q;
  const int64_t rows_of_head = is_in_pages ? params.len_kv
                               : work.is_k ? params.kv_rows
                                           : params.q_rows;
  const int64_t first_head = is_flat ? 0 : static_cast<int64_t>(work.batch) * heads;
  return (first_head + work.head) * rows_of_head + (is_in_pages ? 0 : work.own().start);
}

template <class Spec>
__device__ __forceinline__ void quantize(const QuantParams& params) {
  using Row = QuantRow<Spec>;
  constexpr int kDim = Row::kDim, kLanes = Row::kLanes, kRowsPerPass = Row::kRowsPerPass;
  constexpr int kPasses = kQuantKeys / kRowsPerPass;
  static_assert(kPasses * kRowsPerPass == kQuantKeys, "no row of the next block");
  constexpr float kLargest = 127.f;
  // c balances q and k: if either is below this, scores are 0 for every purpose. And the product of
  // two scales must not be 0, since 0 times a hidden score, -inf, is NaN.
  constexpr float kLeast = 1e-10f;
  static_assert(sizeof(QuantParams) == Spec::kParamsBytes,
                "host and device disagree on QuantParams");
  static_assert(Spec::kSmemBytes == 0);
  __shared__ float s_most[Spec::kNumThreads / 32];

  // Last blocks first: the L2 cache still holds them.
  const QuantWork work = quant_work(params, kQuantKeys, gridDim.x - 1 - blockIdx.x);
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const int len = work.own().length;
  if (work.block * kQuantKeys >= len) return;  // beyond the end of this sequence
  const int group = params.heads_q / params.heads_kv;
  const int kv_head = work.is_k ? work.head : work.head / group;
  // Loads all rows at once; past the end, the last row is loaded again, which is harmless.
  Vec16 loaded[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = work.block * kQuantKeys + first + pass * kRowsPerPass;
    loaded[pass] = Row::load(params, work, min_of(row, len - 1), lane);
  }
  const EvenChannels<Spec> even(params, work, kv_head, lane);
  const int64_t first_out = first_row_out<Spec>(params, work);
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
      if (!work.is_k) along_mean = fmaf(x[i], even.mean[i], along_mean);
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
      // Without keys the LSE is -inf, whatever q is.
      params.along_mean[first_out + row] = work.kv.length == 0 ? 0.f : along_mean;
    }
  }
  if (work.is_k) {
    most_of_all = largest_of_cta(most_of_all, s_most);
    if (threadIdx.x == 0) {
      const int64_t of_head = static_cast<int64_t>(work.batch) * params.heads_kv + work.head;
      params.k_scale[of_head * ceil_div(params.len_kv, kQuantKeys) + work.block] =
          fmaxf(most_of_all, kLeast) / kLargest;
    }
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = work.block * kQuantKeys + first + pass * kRowsPerPass;
    if (row >= len) continue;
    const float inverse = kLargest / fmaxf(work.is_k ? most_of_all : most[pass], kLeast);
    even.store(g_out + static_cast<int64_t>(row) * kDim + lane * 8, loaded[pass], inverse);
  }
  if constexpr (Spec::kValues == Switch::kOn) {
    if (work.is_k) round_values<Spec>(params, work, first_out);
  }
}

}  // namespace jitattn

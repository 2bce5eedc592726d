// Kernel      Computes the row statistics of the backward kernels: LSE in base 2, and delta.
//
// Math        delta = (sum over columns of dO * O) - dLSE; lse_log2 = LSE log2(e), +inf for a row
//             that saw no key, whose weights are then exp2(-inf) = 0. With a sink s, which LSE
//             excludes, the keys keep rest = 1 / (1 + e^(s - LSE)) of the weights:
//             dS = P (rest dO V^T - delta), with P from LSE and delta = rest (dO * O) - dLSE; and
//             ds = -sum over rows of (1 - rest) dO * O. With folds_sinks, LSE includes the sink
//             instead, so that P is what the keys have of the weights, and delta has no factor: if
//             the LSE has no gradient, dS = P (dO V^T - delta) as without sinks.
//
// Paper       Dao, FlashAttention-2, arXiv:2307.08691, Algorithm 2, line 4.
//
// Work split  kLanes neighbouring lanes per row; heads vary fastest.
#pragma once

#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// log2(2^lse + 2^sink), where the sink is `excess` above the LSE.
__device__ __forceinline__ float with_sink(float lse_log2, float excess) {
  const float larger = max_of(excess, 0.f), below = -fabsf(excess);
  return lse_log2 + larger + ptx::log2_approx(1.f + ptx::exp2_approx(below));
}

template <class Spec>
__device__ __forceinline__ void bwd_preprocess(const BwdPreprocessParams& params) {
  static_assert(sizeof(BwdPreprocessParams) == Spec::kParamsBytes,
                "host and device disagree on BwdPreprocessParams");
  using Element = Scalar<Spec::kDtype>;
  using T = typename Element::type;
  constexpr int kWide = 16 / sizeof(T);
  constexpr int kVec = Spec::kAccess == Access::kVec16 ? kWide : 1;
  constexpr int kChunks = Spec::kHeadDimV / kVec;
  constexpr int kLanes = Spec::kLanes;
  static_assert(Spec::kNumThreads % kLanes == 0, "a row is of one CTA");
  constexpr float kLog2e = 1.4426950408889634f;

  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t idx = static_cast<int64_t>(blockIdx.x) * (Spec::kNumThreads / kLanes) +
                      static_cast<int>(threadIdx.x) / kLanes;
  const bool exists = idx < params.num_rows;
  const Division by_head = divide(idx, params.heads_q);
  const Division by_row = divide(by_head.quotient, params.len_q);
  const int64_t batch = by_row.quotient, position = by_row.rest, head = by_head.rest;
  // Loaded together with the columns: a second wait would halve the bytes in flight.
  float lse = 0.f, d_lse = 0.f;
  if (exists) {
    lse = params.lse[batch * params.lse_stride_batch + head * params.lse_stride_head +
                     position * params.lse_stride_row];
    if (params.d_lse != nullptr) {
      d_lse = params.d_lse[batch * params.d_lse_stride_batch + head * params.d_lse_stride_head +
                           position * params.d_lse_stride_row];
    }
  }
  const T* g_out = static_cast<const T*>(params.out) + batch * params.out_stride_batch +
                   position * params.out_stride_row + head * params.out_stride_head;
  const T* g_d_out = static_cast<const T*>(params.d_out) + batch * params.d_out_stride_batch +
                     position * params.d_out_stride_row + head * params.d_out_stride_head;
  float sum = 0.f;
#pragma unroll
  for (int pass = 0; pass < ceil_div(kChunks, kLanes); ++pass) {
    const int chunk = pass * kLanes + lane;
    if (!exists || (kChunks % kLanes != 0 && chunk >= kChunks)) break;
    if constexpr (kVec > 1) {
      union {
        Vec16 vec;
        T element[kVec];
      } out, d_out;
      out.vec = *reinterpret_cast<const Vec16*>(g_out + chunk * kVec);
      d_out.vec = *reinterpret_cast<const Vec16*>(g_d_out + chunk * kVec);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sum = fmaf(Element::load(out.element[i]), Element::load(d_out.element[i]), sum);
      }
    } else {
      sum = fmaf(Element::load(g_out[chunk]), Element::load(g_d_out[chunk]), sum);
    }
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  }
  if (!exists || lane != 0) return;
  const int64_t to = (batch * params.heads_q + head) * params.len_q + position;
  const bool is_blind = lse == -infinity();
  float lse_log2 = is_blind ? infinity() : lse * kLog2e;
  float delta = sum;
  if (params.sinks != nullptr) {
    const float excess = __ldg(params.sinks + head) * kLog2e - lse_log2;
    const float rest = is_blind ? 0.f : 1.f / (1.f + ptx::exp2_approx(excess));
    const float of_sink = is_blind ? 0.f : 1.f / (1.f + ptx::exp2_approx(-excess));
    params.d_sink[to] = is_blind ? 0.f : -of_sink * sum;
    params.sink_rest[to] = rest;
    if (params.folds_sinks == 0) {
      delta *= rest;
    } else if (!is_blind) {
      lse_log2 = with_sink(lse_log2, excess);
    }
  }
  if (d_lse != 0.f) delta -= d_lse;
  if (params.d_out_scale != nullptr) delta *= __ldg(params.d_out_scale);
  params.lse_log2[to] = lse_log2;
  params.delta[to] = is_blind ? 0.f : delta;
}

}  // namespace jitattn

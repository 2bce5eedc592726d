// Kernel      Gradients of combined results (combine.cuh).
#pragma once

#include "jitattn/combine/combine_row.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// dout_s = w_s dout and dLSE_s = w_s (dout . (out_s - out) + dLSE), with w_s = exp(LSE_s - LSE).
template <class Spec>
__device__ __forceinline__ void combine_grad(const CombineGradParams& params) {
  static_assert(sizeof(CombineGradParams) == Spec::kParamsBytes,
                "host and device disagree on CombineGradParams");
  using In = Scalar<Spec::kDtype>;
  using Out = Scalar<Spec::kOutDtype>;
  constexpr int kColumns = ceil_div(Spec::kHeadDimV, 32);
  constexpr float kLog2e = 1.4426950408889634f;

  const int lane_idx = threadIdx.x % 32;
  const CombineRow<Spec, CombineGradParams> own(params);
  const int64_t row = own.row;
  if (row >= params.num_rows) return;
  const auto* g_out = static_cast<const typename Out::type*>(params.out) + row * Spec::kHeadDimV;
  const auto* g_d_out =
      static_cast<const typename Out::type*>(params.d_out) + row * Spec::kHeadDimV;
  const float lse = params.lse[row];
  const float d_lse = params.d_lse == nullptr ? 0.f : params.d_lse[row];

  float out[kColumns], d_out[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = i * 32 + lane_idx;
    const bool exists = column < Spec::kHeadDimV;
    out[i] = exists ? Out::load(g_out[column]) : 0.f;
    d_out[i] = exists ? Out::load(g_d_out[column]) : 0.f;
  }
  for (int part = 0; part < params.num_parts; ++part) {
    const int64_t idx = part * params.num_rows + row;
    const float part_lse = params.part_lses[idx];
    // A part that saw no key is not read.
    const bool is_seen = part_lse != -infinity();
    const float weight = is_seen ? ptx::exp2_approx((part_lse - lse) * kLog2e) : 0.f;
    auto* g_d_part = static_cast<typename In::type*>(params.d_parts) + idx * Spec::kHeadDimV;
    float along = 0.f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = i * 32 + lane_idx;
      if (column >= Spec::kHeadDimV) continue;
      if (is_seen) {
        const float value = In::load(own.g_part[part * params.part_stride_part + column]);
        along = fmaf(d_out[i], value - out[i], along);
      }
      g_d_part[column] = In::round(weight * d_out[i]);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) along += __shfl_xor_sync(0xffffffffu, along, mask);
    if (lane_idx == 0) params.d_part_lses[idx] = is_seen ? weight * (along + d_lse) : 0.f;
  }
}

}  // namespace jitattn

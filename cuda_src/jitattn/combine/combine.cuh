// Kernel      Merges attention results over disjoint sets of keys: jitattn.merge.
//
// Math        M = max_s LSE_s,  w_s = exp(LSE_s - M),  out = sum_s w_s out_s / sum_s w_s,
//             LSE = M + ln sum_s w_s. The parts are added in order. A part whose LSE is -inf saw no
//             key, and is not read.
//
// Work split  One warp per row (batch, head, position); a lane owns columns lane, lane + 32, ...
#pragma once

#include "jitattn/combine/combine_row.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void combine(const CombineParams& params) {
  static_assert(sizeof(CombineParams) == Spec::kParamsBytes,
                "host and device disagree on CombineParams");
  static_assert(Spec::kSmemBytes == 0, "the combine kernel uses no shared memory");
  using In = Scalar<Spec::kDtype>;
  using Out = Scalar<Spec::kOutDtype>;
  constexpr int kColumns = ceil_div(Spec::kHeadDimV, 32);
  constexpr float kLog2e = 1.4426950408889634f;

  const int lane_idx = threadIdx.x % 32;
  const CombineRow<Spec, CombineParams> own(params);
  const int64_t row = own.row;
  if (row >= params.num_rows) return;
  const float* g_lse = params.part_lses + own.batch_idx * params.lse_stride_batch +
                       own.head_idx * params.lse_stride_head + own.position * params.lse_stride_row;

  // ---- Maximum over the parts; -inf if the row saw no key in any of them
  float highest = -infinity();
  for (int part = lane_idx; part < params.num_parts; part += 32) {
    highest = fmaxf(highest, g_lse[part * params.lse_stride_part]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, mask));
  }

  // ---- Weighted sum, in the order of the parts
  float total = 0.f;
  float sum[kColumns] = {};
  for (int part = 0; part < params.num_parts; ++part) {
    const float lse = g_lse[part * params.lse_stride_part];
    if (lse == -infinity()) continue;
    const float weight = ptx::exp2_approx((lse - highest) * kLog2e);
    total += weight;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = i * 32 + lane_idx;
      if (column < Spec::kHeadDimV) {
        sum[i] += weight * In::load(own.g_part[part * params.part_stride_part + column]);
      }
    }
  }

  // ---- Write
  auto* g_out = static_cast<typename Out::type*>(params.out) + row * Spec::kHeadDimV;
  const float inverse = total == 0.f ? 0.f : 1.f / total;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = i * 32 + lane_idx;
    if (column < Spec::kHeadDimV) g_out[column] = Out::round(sum[i] * inverse);
  }
  if (lane_idx == 0) {
    params.lse[row] = total == 0.f ? -infinity() : highest + ptx::log2_approx(total) * kLn2;
  }
}

}  // namespace jitattn

// What        Merges the partial results of split-KV into out and LSE.
//
// Math        M = max_s LSE_s,  w_s = exp(LSE_s - M),  out = sum_s w_s out_s / sum_s w_s,
//             LSE = M + ln sum_s w_s. The splits are added in their order, so the result does not
//             depend on when they finished.
//
// Work split  One warp a row (batch, head, position); a lane owns columns lane, lane + 32, ...
#pragma once

#include "jitattn/enums.cuh"
#include "jitattn/params.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/mma_f32_acc.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void merge_splits(const MergeParams& params) {
  static_assert(sizeof(MergeParams) == Spec::kParamsBytes,
                "host and device disagree on MergeParams");
  static_assert(Spec::kSmemBytes == 0, "the merge kernel uses no shared memory");
  using Element = typename Conditional<Spec::kOutDtype == Dtype::kFp32, float, uint16_t>::type;
  constexpr int kColumns = ceil_div(Spec::kHeadDimV, 32);
  constexpr float kLog2e = 1.4426950408889634f;

  const int lane_idx = threadIdx.x % 32;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (Spec::kNumThreads / 32) + threadIdx.x / 32;
  if (row >= params.num_rows) return;

  // ---- Maximum over the splits; -inf if the row saw nothing in any of them
  float highest = -infinity();
  for (int split = lane_idx; split < params.num_splits; split += 32) {
    highest = fmaxf(highest, params.partial_lse[split * params.num_rows + row]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, mask));
  }

  // ---- Weighted sum, in the order of the splits
  float total = 0.f;
  float sum[kColumns] = {};
  for (int split = 0; split < params.num_splits; ++split) {
    const int64_t part = split * params.num_rows + row;
    const float lse = params.partial_lse[part];
    if (lse == -infinity()) continue;
    const float weight = ptx::exp2_approx((lse - highest) * kLog2e);
    total += weight;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = i * 32 + lane_idx;
      if (column < Spec::kHeadDimV) {
        sum[i] += weight * params.partial_out[part * Spec::kHeadDimV + column];
      }
    }
  }

  // ---- Write
  const int64_t batch_and_head = row / params.len_q, position = row % params.len_q;
  const int64_t batch_idx = batch_and_head / params.heads_q,
                head_idx = batch_and_head % params.heads_q;
  Element* g_out = static_cast<Element*>(params.out) + batch_idx * params.out_stride_batch +
                   position * params.out_stride_row + head_idx * params.out_stride_head;
  const float inverse = total == 0.f ? 0.f : 1.f / total;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = i * 32 + lane_idx;
    if (column >= Spec::kHeadDimV) continue;
    if constexpr (Spec::kOutDtype == Dtype::kFp32) {
      g_out[column] = sum[i] * inverse;
    } else {
      g_out[column] = static_cast<Element>(MmaF32Acc<Spec::kOutDtype>::pack(sum[i] * inverse, 0.f));
    }
  }
  if (params.lse != nullptr && lane_idx == 0) {
    params.lse[row] = total == 0.f ? -infinity() : highest + ptx::log2_approx(total) * kLn2;
  }
}

}  // namespace jitattn

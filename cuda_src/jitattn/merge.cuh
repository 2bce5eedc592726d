// What        Merges results of attention over disjoint sets of keys: jitattn.merge.
//
// Math        M = max_s LSE_s,  w_s = exp(LSE_s - M),  out = sum_s w_s out_s / sum_s w_s,
//             LSE = M + ln sum_s w_s. The parts are added in their order. A part whose LSE is -inf
//             saw nothing, and is not read.
//
// Work split  One warp a row (batch, head, position); a lane owns columns lane, lane + 32, ...
#pragma once

#include "jitattn/element.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// The row of this warp, and where its first part is.
template <class Spec, class Params>
struct MergeRow {
  using T = typename Scalar<Spec::kDtype>::type;
  int64_t row;
  int64_t position;
  int64_t head_idx;
  int64_t batch_idx;
  const T* g_part;

  __device__ explicit MergeRow(const Params& params)
      : row(static_cast<int64_t>(blockIdx.x) * (Spec::kNumThreads / 32) + threadIdx.x / 32) {
    const int64_t batch_and_head = row / params.len_q;
    position = row % params.len_q;
    batch_idx = batch_and_head / params.heads_q;
    head_idx = batch_and_head % params.heads_q;
    g_part = static_cast<const T*>(params.parts) + batch_idx * params.part_stride_batch +
             position * params.part_stride_row + head_idx * params.part_stride_head;
  }
};

template <class Spec>
__device__ __forceinline__ void merge_parts(const MergeParams& params) {
  static_assert(sizeof(MergeParams) == Spec::kParamsBytes,
                "host and device disagree on MergeParams");
  static_assert(Spec::kSmemBytes == 0, "the merge kernel uses no shared memory");
  using In = Scalar<Spec::kDtype>;
  using Out = Scalar<Spec::kOutDtype>;
  constexpr int kColumns = ceil_div(Spec::kHeadDimV, 32);
  constexpr float kLog2e = 1.4426950408889634f;

  const int lane_idx = threadIdx.x % 32;
  const MergeRow<Spec, MergeParams> own(params);
  const int64_t row = own.row;
  if (row >= params.num_rows) return;
  const float* g_lse = params.part_lses + own.batch_idx * params.lse_stride_batch +
                       own.head_idx * params.lse_stride_head + own.position * params.lse_stride_row;

  // ---- Maximum over the parts; -inf if the row saw nothing in any of them
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

// dout_s = w_s dout and dLSE_s = w_s (dout . (out_s - out) + dLSE), with w_s = exp(LSE_s - LSE).
template <class Spec>
__device__ __forceinline__ void merge_grad(const MergeGradParams& params) {
  static_assert(sizeof(MergeGradParams) == Spec::kParamsBytes,
                "host and device disagree on MergeGradParams");
  using In = Scalar<Spec::kDtype>;
  using Out = Scalar<Spec::kOutDtype>;
  constexpr int kColumns = ceil_div(Spec::kHeadDimV, 32);
  constexpr float kLog2e = 1.4426950408889634f;

  const int lane_idx = threadIdx.x % 32;
  const MergeRow<Spec, MergeGradParams> own(params);
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
    // A part that saw nothing is not read.
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

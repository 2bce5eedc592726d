// Kernel      Scales vectors, or equal slices (groups) of them, to length 1: cosine
//             attention. (Gradient: l2norm_grad.cuh.)
//
// Math        y = scale_h x / |x|, |x| in fp32; 0 for a vector shorter than 1e-12.
//             dx = scale_h (dy - u (u dy)) / |x| with u = x / |x|; dscale_h = sum of u dy
//
// Work split  kLanes neighbouring lanes per slice; q first, then k, in one launch. The gradients of
//             q and of k take one launch each.
#pragma once

#include "jitattn/prepare/slice.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void l2norm(const NormParams& params) {
  static_assert(sizeof(NormParams) == Spec::kParamsBytes, "host and device disagree on NormParams");
  static_assert(Spec::kSmemBytes == 0, "the norm kernel uses no shared memory");
  using Slice = jitattn::Slice<Spec>;
  using T = typename Slice::T;
  constexpr int kSlice = Slice::kSize, kLanes = Slice::kLanes;

  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
  int64_t slice = thread / kLanes;
  const int lane = static_cast<int>(thread % kLanes);
  const bool is_k = slice >= params.num_slices_q;
  if (is_k) slice -= params.num_slices_q;
  const bool exists = slice < (is_k ? params.num_slices_k : params.num_slices_q);
  const int heads = is_k ? params.heads_k : params.heads_q;
  const int len = max_of(1, is_k ? params.len_k : params.len_q);  // len_k may be 0
  const int64_t group = slice % Spec::kGroups, vector = slice / Spec::kGroups;
  const Division by_head = divide(vector, heads), by_row = divide(by_head.quotient, len);
  const int64_t batch = by_row.quotient, row = by_row.rest, head = by_head.rest;
  const int64_t from = batch * (is_k ? params.k_stride_batch : params.q_stride_batch) +
                       row * (is_k ? params.k_stride_row : params.q_stride_row) +
                       head * (is_k ? params.k_stride_head : params.q_stride_head) + group * kSlice;

  Slice x;
  x.load(static_cast<const T*>(is_k ? params.k : params.q) + from, lane, exists);
  float factor = inverse_length(x.dot(x));
  if (!exists) return;
  if (!is_k && params.head_scale != nullptr) {
    factor *=
        __ldg(params.head_scale + row * params.scale_stride_row + head * params.scale_stride_head);
  }
  x.combine(factor, 0.f, x);
  x.store(static_cast<T*>(is_k ? params.k_out : params.q_out) + slice * kSlice, lane);
}

}  // namespace jitattn

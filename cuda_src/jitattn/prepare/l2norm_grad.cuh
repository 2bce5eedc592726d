// Kernel      Gradient of normalised vectors (l2norm.cuh).
#pragma once

#include "jitattn/prepare/slice.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void l2norm_grad(const NormGradParams& params) {
  static_assert(sizeof(NormGradParams) == Spec::kParamsBytes,
                "host and device disagree on NormGradParams");
  using Slice = jitattn::Slice<Spec>;
  using T = typename Slice::T;
  constexpr int kSlice = Slice::kSize, kLanes = Slice::kLanes;

  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
  const int64_t slice = thread / kLanes;
  const int lane = static_cast<int>(thread % kLanes);
  const bool exists = slice < params.num_slices;
  const int64_t group = slice % Spec::kGroups, vector = slice / Spec::kGroups;
  const Division by_head = divide(vector, params.heads);
  const Division by_row = divide(by_head.quotient, params.len);
  const int64_t batch = by_row.quotient, row = by_row.rest, head = by_head.rest;
  Slice x, d_y;
  x.load(static_cast<const T*>(params.x) + batch * params.x_stride_batch +
             row * params.x_stride_row + head * params.x_stride_head + group * kSlice,
         lane, exists);
  d_y.load(static_cast<const T*>(params.d_y) + slice * kSlice, lane, exists);
  const float inverse = inverse_length(x.dot(x));
  const float along = inverse * x.dot(d_y);  // u dy
  if (!exists) return;
  float scale = 1.f;
  if (params.head_scale != nullptr) {
    scale =
        __ldg(params.head_scale + row * params.scale_stride_row + head * params.scale_stride_head);
  }
  if (params.d_scale != nullptr && lane == 0) params.d_scale[slice] = along;
  d_y.combine(scale * inverse, -scale * inverse * inverse * along, x);
  d_y.store(static_cast<T*>(params.dx) + slice * kSlice, lane);
}

}  // namespace jitattn

// What        A gradient from fp32 parts in its own order: dQ of ragged sequences from its sums, dK or
//             dV from what splits add. Parts are added up in order, scaled and rounded.
//
// Work split  A thread: four values of one row.
#pragma once

#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void sum_parts(const SumPartsParams& params) {
  static_assert(sizeof(SumPartsParams) == Spec::kParamsBytes,
                "host and device disagree on SumPartsParams");
  using Element = Scalar<Spec::kDtype>;
  using T = typename Element::type;
  constexpr int kQuads = ceil_div(Spec::kHeadDim, 4);

  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
  const Division by_quad = divide(thread, kQuads);
  if (by_quad.quotient >= params.num_rows) return;
  const Division by_head = divide(by_quad.quotient, params.heads);
  const Division by_row = divide(by_head.quotient, params.length);
  const int64_t batch = by_row.quotient, row = by_row.rest, head = by_head.rest;
  const int first_column = static_cast<int>(by_quad.rest) * 4;
  const float* g_part = params.parts + batch * params.part_stride_batch +
                        row * params.part_stride_row + head * params.part_stride_head +
                        first_column;
  float sum[4] = {};
  for (int part = 0; part < params.num_parts; ++part, g_part += params.part_stride_part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first_column + i < Spec::kHeadDim) sum[i] += g_part[i];
    }
  }
  const float scale = params.scale * (params.unscale == nullptr ? 1.f : __ldg(params.unscale));
  T* g_out = static_cast<T*>(params.out) + batch * params.out_stride_batch +
             row * params.out_stride_row + head * params.out_stride_head + first_column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first_column + i < Spec::kHeadDim) g_out[i] = Element::round(sum[i] * scale);
  }
}

}  // namespace jitattn

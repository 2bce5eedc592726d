// Kernel      Sums fp32 parts of a gradient in row order: dQ of ragged sequences, and dK or dV
//             of query splits. Parts are added in order, scaled and rounded.
//
// Work split  A thread: four values of one row.
#pragma once

#include "jitattn/bwd/gradient_quad.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void sum_parts(const SumPartsParams& params) {
  static_assert(sizeof(SumPartsParams) == Spec::kParamsBytes,
                "host and device disagree on SumPartsParams");
  GradientQuad<Spec> own(params.num_rows, params.heads, params.length);
  if (!own.exists) return;
  own.add(params.parts + own.outer * params.part_stride_batch + own.row * params.part_stride_row +
              own.head * params.part_stride_head,
          params.num_parts, params.part_stride_part);
  using T = typename GradientQuad<Spec>::T;
  T* g_out = static_cast<T*>(params.out) + own.outer * params.out_stride_batch +
             own.row * params.out_stride_row + own.head * params.out_stride_head;
  own.store(g_out, params.scale, params.unscale);
}

}  // namespace jitattn

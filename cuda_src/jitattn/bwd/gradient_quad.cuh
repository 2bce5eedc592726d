// Four values of one row of a gradient, which a thread sums from fp32 parts. Threads of one row are
// neighbours, then heads, then rows.
#pragma once

#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct GradientQuad {
  using Element = Scalar<Spec::kDtype>;
  using T = typename Element::type;
  static constexpr int kQuads = ceil_div(Spec::kHeadDim, 4);

  int64_t outer;  // sequence or page
  int64_t row;    // within the sequence or page
  int64_t head;
  int first_column;
  bool exists;
  float sum[4] = {};

  __device__ GradientQuad(int64_t num_rows, int heads, int rows_of_outer) {
    const int64_t thread =
        static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
    const Division by_quad = divide(thread, kQuads);
    const Division by_head = divide(by_quad.quotient, heads);
    const Division by_row = divide(by_head.quotient, rows_of_outer);
    outer = by_row.quotient;
    row = by_row.rest;
    head = by_head.rest;
    first_column = static_cast<int>(by_quad.rest) * 4;
    exists = by_quad.quotient < num_rows;
  }

  // Adds the parts of a row in order; g_row: column 0 of the first part.
  __device__ void add(const float* g_row, int num_parts, int64_t stride_part) {
    const float* g_part = g_row + first_column;
    for (int part = 0; part < num_parts; ++part, g_part += stride_part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first_column + i < Spec::kHeadDim) sum[i] += g_part[i];
      }
    }
  }

  // Rounds the sums and writes them; g_row: column 0.
  __device__ void store(T* g_row, float scale, const float* g_unscale) const {
    const float factor = scale * (g_unscale == nullptr ? 1.f : __ldg(g_unscale));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = first_column + i;
      if (column < Spec::kHeadDim) g_row[column] = Element::round(sum[i] * factor);
    }
  }
};

}  // namespace jitattn

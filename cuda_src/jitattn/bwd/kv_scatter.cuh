// What        dK or dV of keys that sequences share, from what each sequence adds: pages, or rows
// of
//             the batch that are named. Splits and sequences are added up in order.
//
// Work split  A thread: four values of one row of one page. It goes through the places of the block
//             table that name the page, which are sorted: bounds[p] … bounds[p + 1] of entries.
#pragma once

#include "jitattn/attention/spans.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void kv_scatter(const ScatterParams& params) {
  static_assert(sizeof(ScatterParams) == Spec::kParamsBytes,
                "host and device disagree on ScatterParams");
  using Element = Scalar<Spec::kDtype>;
  using T = typename Element::type;
  constexpr int kQuads = ceil_div(Spec::kHeadDim, 4);

  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
  const Division by_quad = divide(thread, kQuads);
  if (by_quad.quotient >= params.num_rows) return;
  const Division by_head = divide(by_quad.quotient, params.heads);
  const Division by_row = divide(by_head.quotient, params.page_size);
  const int64_t page = by_row.quotient, row = by_row.rest, head = by_head.rest;
  const int first_column = static_cast<int>(by_quad.rest) * 4;

  float sum[4] = {};
  for (int64_t entry = params.bounds[page]; entry < params.bounds[page + 1]; ++entry) {
    const Division place = divide(params.entries[entry], params.table_width);
    const int batch_idx = static_cast<int>(place.quotient);
    const Span keys = load_span(params.kv_start, params.kv_stop, batch_idx, params.kv_word,
                                params.kv_span_kind, params.longest, params.kv_rows);
    const int64_t key = place.rest * params.page_size + row - keys.start;
    if (key < 0 || key >= keys.length) continue;
    const float* g_row = params.sum + batch_idx * params.sum_stride_batch +
                         key * params.sum_stride_row + head * params.sum_stride_head;
    for (int part = 0; part < params.num_parts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first_column + i < Spec::kHeadDim) {
          sum[i] += g_row[part * params.sum_stride_part + first_column + i];
        }
      }
    }
  }

  const float scale = params.scale * (params.unscale == nullptr ? 1.f : __ldg(params.unscale));
  T* g_out = static_cast<T*>(params.out) + page * params.out_stride_page +
             row * params.out_stride_row + head * params.out_stride_head;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = first_column + i;
    if (column < Spec::kHeadDim) g_out[column] = Element::round(sum[i] * scale);
  }
}

}  // namespace jitattn

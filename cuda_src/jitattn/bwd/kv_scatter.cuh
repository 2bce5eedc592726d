// Kernel      Sums dK or dV of keys that sequences share (pages, or named rows of the batch) over
//             the sequences' parts. Splits and sequences are added in order.
//
// Work split  A thread: four values of one row of one page. It visits the entries of the block
//             table that name page p, which are sorted: [bounds[p], bounds[p + 1]).
#pragma once

#include "jitattn/attention/spans.cuh"
#include "jitattn/bwd/gradient_quad.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void kv_scatter(const ScatterParams& params) {
  static_assert(sizeof(ScatterParams) == Spec::kParamsBytes,
                "host and device disagree on ScatterParams");
  GradientQuad<Spec> own(params.num_rows, params.heads, params.page_size);
  if (!own.exists) return;
  const int64_t page = own.outer;
  for (int64_t entry = params.bounds[page]; entry < params.bounds[page + 1]; ++entry) {
    const Division place = divide(params.entries[entry], params.table_width);
    const int batch_idx = static_cast<int>(place.quotient);
    const Span keys = load_span(params.kv_start, params.kv_stop, batch_idx, params.kv_word,
                                params.kv_span_kind, params.longest, params.kv_rows);
    const int64_t key = place.rest * params.page_size + own.row - keys.start;
    if (key < 0 || key >= keys.length) continue;
    own.add(params.sum + batch_idx * params.sum_stride_batch + key * params.sum_stride_row +
                own.head * params.sum_stride_head,
            params.num_parts, params.sum_stride_part);
  }
  using T = typename GradientQuad<Spec>::T;
  T* g_out = static_cast<T*>(params.out) + page * params.out_stride_page +
             own.row * params.out_stride_row + own.head * params.out_stride_head;
  own.store(g_out, params.scale, params.unscale);
}

}  // namespace jitattn

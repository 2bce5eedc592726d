// The row of a warp in the combine kernel and in its gradient.
#pragma once

#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// The row of this warp, and the address of its first part.
template <class Spec, class Params>
struct CombineRow {
  using T = typename Scalar<Spec::kDtype>::type;
  int64_t row;
  int64_t position;
  int64_t head_idx;
  int64_t batch_idx;
  const T* g_part;

  __device__ explicit CombineRow(const Params& params)
      : row(static_cast<int64_t>(blockIdx.x) * (Spec::kNumThreads / 32) + threadIdx.x / 32) {
    const int64_t batch_and_head = row / params.len_q;
    position = row % params.len_q;
    batch_idx = batch_and_head / params.heads_q;
    head_idx = batch_and_head % params.heads_q;
    g_part = static_cast<const T*>(params.parts) + batch_idx * params.part_stride_batch +
             position * params.part_stride_row + head_idx * params.part_stride_head;
  }
};

}  // namespace jitattn

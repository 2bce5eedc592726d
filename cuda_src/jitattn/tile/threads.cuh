// Thread groups that work on a tile together: thread indices and barrier.
#pragma once

#include "jitattn/ptx/shared.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// All threads of a CTA. A kernel family with producer warps provides its own group, which counts
// the other threads from 0 and has its own barrier.
template <int kCount>
struct CtaThreads {
  static constexpr int kNumThreads = kCount;
  static constexpr int kNumWarps = kCount / 32;

  __device__ static uint32_t idx() { return threadIdx.x; }
  __device__ static void sync() { ptx::barrier_sync<kCount>(); }
};

}  // namespace jitattn

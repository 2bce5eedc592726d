// The threads that work on a tile together: their numbers, and how they wait for each other.
#pragma once

#include "jitattn/ptx/shared.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// All threads of a CTA. A family whose CTAs have producer warps counts the others from 0, and has a
// barrier of theirs.
template <int kCount>
struct CtaThreads {
  static constexpr int kNumThreads = kCount;
  static constexpr int kNumWarps = kCount / 32;

  __device__ static uint32_t idx() { return threadIdx.x; }
  __device__ static void sync() { ptx::barrier_sync<kCount>(); }
};

}  // namespace jitattn

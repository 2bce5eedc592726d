// Thread groups that are a part of a CTA: thread indices and barrier.
#pragma once

#include "jitattn/ptx/sm90/warpgroup.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// kCount threads from thread kFirst on, with a named barrier of their own.
template <int kFirst, int kCount, int kBarrier>
struct SomeThreads {
  static constexpr int kNumThreads = kCount;
  static constexpr int kNumWarps = kCount / 32;

  __device__ static uint32_t idx() { return threadIdx.x - kFirst; }
  __device__ static void sync() { ptx::named_barrier_sync(kBarrier, kCount); }
};

}  // namespace jitattn

// Maxima over the threads of a warp and of a CTA.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// Maximum over a CTA. Called by all threads; s_most: one word of shared memory per warp.
template <int kNumWarps>
__device__ __forceinline__ float largest_of_cta(float x, float (&s_most)[kNumWarps]) {
  x = largest_of_warp(x);
  if (threadIdx.x % 32 == 0) s_most[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kNumWarps; ++i) x = fmaxf(x, s_most[i]);
  return x;
}

}  // namespace jitattn

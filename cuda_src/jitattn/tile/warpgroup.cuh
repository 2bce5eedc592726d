// What warpgroups do with values that all lanes share, with buffers, and with accumulators.
#pragma once

#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/tile/wgmma_operand.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// Tells the compiler that a number is the same in all lanes, so that descriptors made of it are
// computed in uniform registers.
__device__ __forceinline__ int uniform(int number) { return __shfl_sync(0xffffffffu, number, 0); }

// Says, with all lanes of a warp, that it has finished with a stage.
__device__ __forceinline__ void release(uint32_t s_empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(s_empty);
}

// Zeros the rows outside [begin, end) of kRows rows, in pages of kPageRows. All threads go through
// all steps, and only the stores have conditions: a branch would move descriptors to vector
// registers.
template <int kRows, int kThreads, int kPages, int kPageRows = kRows>
__device__ __forceinline__ void clear_rows(uint32_t s_rows, uint32_t thread_idx, int begin,
                                           int end) {
  constexpr int kChunks = kPageRowBytes / 16;
#pragma unroll
  for (int step = 0; step < ceil_div(kRows * kChunks, kThreads); ++step) {
    const int chunk = step * kThreads + thread_idx, row = chunk / kChunks;
#pragma unroll
    for (int page = 0; page < kPages; ++page) {
      if ((row < begin || row >= end) && row < kRows) {
        ptx::st_shared_v4(s_rows + page * kPageRows * kPageRowBytes + chunk * 16, Vec16{});
      }
    }
  }
}

// The accumulators of a row of tiles, one after the other.
template <int kTiles>
__device__ __forceinline__ float (&flat(float (&tiles)[1][kTiles][4]))
    [kTiles * 4] { return reinterpret_cast<float (&)[kTiles * 4]>(tiles); }

}  // namespace jitattn

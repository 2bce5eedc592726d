// Sums dQ over key blocks in global memory: the dq semaphore, which orders the blocks, and the
// additions.
#pragma once

#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/dq_fragments.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Returns the semaphore of a query tile: the number of key blocks that have added to its dQ.
template <class Spec>
__device__ __forceinline__ int32_t* dq_semaphore(const BwdParamsOf<Spec>& params, int batch_idx,
                                                 int head_idx, int tile) {
  return params.dq_semaphore +
         (static_cast<int64_t>(batch_idx) * params.heads_q + head_idx) * params.num_q_tiles + tile;
}

// Waits until `semaphore_value` key blocks have added to dQ of a query tile, if their order is
// fixed (kDeterministic).
template <class Spec, class Traits>
__device__ __forceinline__ void wait_dq_semaphore(const BwdParamsOf<Spec>& params, int batch_idx,
                                                  int head_idx, int tile, int semaphore_value) {
  if constexpr (Spec::kDeterministic == Switch::kOn) {
    if (threadIdx.x == 0) {
      const int32_t* g_semaphore = dq_semaphore<Spec>(params, batch_idx, head_idx, tile);
      while (ptx::ld_acquire(g_semaphore) != semaphore_value) __nanosleep(64);
    }
    ptx::barrier_sync<Traits::kNumThreads>();
  }
}

// Publishes the additions of this key block and releases the next one, if their order is fixed.
template <class Spec, class Traits>
__device__ __forceinline__ void release_dq_semaphore(const BwdParamsOf<Spec>& params, int batch_idx,
                                                     int head_idx, int tile) {
  if constexpr (Spec::kDeterministic == Switch::kOn) {
    __threadfence();
    ptx::barrier_sync<Traits::kNumThreads>();
    if (threadIdx.x == 0) {
      ptx::red_release_add(dq_semaphore<Spec>(params, batch_idx, head_idx, tile), 1);
    }
  }
}

// Adds a warp's part of a tile of dQ to the sums, in fragment order or row by row.
template <class Spec, class Traits, class DqTiles, class Grid>
__device__ __forceinline__ void add_dq_tile(const BwdParamsOf<Spec>& params,
                                            const Sequence& sequence, const DqTiles& r_dq,
                                            const Grid& grid_dq, int batch_idx, int head_idx,
                                            int tile, int warp_idx, int lane_idx) {
  constexpr int kBlockQ = Spec::kBlockQ;
  float* g_dq =
      params.dq_sum + batch_idx * params.dq_stride_batch + head_idx * params.dq_stride_head;
  if constexpr (Traits::kDqInFragments) {
    using Fragments = DqFragments<Spec::kArch>;
    constexpr int kTiles = Grid::kRowTiles * Grid::kColumnTiles;
    g_dq += static_cast<int64_t>(tile) * (kBlockQ * Grid::kPaddedColumns) +
            warp_idx * (kTiles * Fragments::kTile);
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Grid::kColumnTiles; ++n) {
        if (n >= grid_dq.num_tiles) continue;
        Fragments::add(g_dq + (m * Grid::kColumnTiles + n) * Fragments::kTile, r_dq[m][n],
                       lane_idx);
      }
    }
  } else {
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row =
            tile * kBlockQ + grid_dq.first_row + m * 16 + accumulator_row(lane_idx, half);
        if (row >= sequence.len_q || row < sequence.first_position) continue;
        float* g_row = g_dq + (sequence.q_start + row) * params.dq_stride_row +
                       grid_dq.first_column + accumulator_column(lane_idx);
#pragma unroll
        for (int n = 0; n < Grid::kColumnTiles; ++n) {
          const int column = grid_dq.first_column + n * 8 + accumulator_column(lane_idx);
          const float left = r_dq[m][n][2 * half], right = r_dq[m][n][2 * half + 1];
          if (n >= grid_dq.num_tiles) continue;
          if constexpr (Spec::kHeadDim % 2 == 0 && Spec::kArch >= 90) {
            if (column < Spec::kHeadDim) ptx::red_add_v2(g_row + n * 8, left, right);
          } else {
            if (column < Spec::kHeadDim) ptx::red_add(g_row + n * 8, left);
            if (column + 1 < Spec::kHeadDim) ptx::red_add(g_row + n * 8 + 1, right);
          }
        }
      }
    }
  }
}

}  // namespace jitattn

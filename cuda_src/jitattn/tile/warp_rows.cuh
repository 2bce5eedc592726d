// Rows of a CTA's tile that a warp holds in its accumulators.
#pragma once

#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// Row tiles of 16 rows, kStep rows apart: 16 with mma.sync; 64 with wgmma, where each warp of a
// warpgroup holds 16 of them.
template <int kStep>
struct WarpRows {
  static_assert(kStep % 16 == 0);

  int first;  // of row tile 0
  int lane_idx;

  // Row of c[2 * half] and c[2 * half + 1] of row tile m: relative to the warp, and in the CTA's
  // tile.
  __device__ int offset(int m, int half) const {
    return m * kStep + accumulator_row(lane_idx, half);
  }
  __device__ int operator()(int m, int half) const { return first + offset(m, half); }

  // Returns the last row of kRowTiles row tiles.
  template <int kRowTiles>
  __device__ int last() const {
    return first + (kRowTiles - 1) * kStep + 15;
  }

  // Returns row `idx` of the warp's own rows, in order.
  __device__ int nth(int idx) const {
    if constexpr (kStep == 16) return first + idx;
    return first + idx / 16 * kStep + idx % 16;
  }
};

}  // namespace jitattn

// Fragment layouts of mma.m16n8k16 and m16n8k8: the tile elements that a lane holds, and the rows
// that it addresses for ldmatrix. These maps exist only here.
//
// Accumulator c[4] of an m16n8 tile (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//
//              column 2t  2t+1               t = lane % 4
//   row g        c[0]     c[1]               g = lane / 4
//   row g + 8    c[2]     c[3]
#pragma once

#include "jitattn/tile/swizzle.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// Row of c[2 * half] and c[2 * half + 1] within the 16 rows of a tile.
__device__ __forceinline__ int accumulator_row(int lane_idx, int half) {
  return (lane_idx >> 2) + 8 * half;
}

// Column of c[0] and c[2] within the 8 columns of a tile; c[1] and c[3] are the next one.
__device__ __forceinline__ int accumulator_column(int lane_idx) { return (lane_idx & 3) * 2; }

// Transposes a 4x4 block of words across four neighbouring lanes: each lane has one word of each of
// four tiles, and lane j receives the words of tile j in lane order.
__device__ __forceinline__ void transpose_in_fours(uint32_t (&word)[4], int lane_idx) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool is_high = (lane_idx & bit) != 0;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if ((low & bit) != 0) continue;
      const int high = low + bit;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, is_high ? word[low] : word[high], bit);
      word[low] = is_high ? got : word[low];
      word[high] = is_high ? word[high] : got;
    }
  }
}

// ldmatrix.x4 lane addresses. The four 8x8 blocks lie as
// [rows 0-7 | rows 8-15] x [chunk 0 | chunk 1]. The operand determines whether rows or chunks vary
// first from register to register.

// Row first: operand A from [row][k], and operand B of two n8 tiles from [k][n], transposed.
template <int kChunks>
__device__ __forceinline__ uint32_t lane_offset_row_first(int lane_idx) {
  return Swizzle<kChunks>::offset(lane_idx & 15, lane_idx >> 4);
}

// Chunk first: operand B of two n8 tiles from [n][k].
template <int kChunks>
__device__ __forceinline__ uint32_t lane_offset_chunk_first(int lane_idx) {
  return Swizzle<kChunks>::offset((lane_idx & 7) + ((lane_idx >> 4) << 3), (lane_idx >> 3) & 1);
}

}  // namespace jitattn

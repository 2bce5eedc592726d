// Fragment-order layout of dQ sums: a tile [block_q, kDim] is contiguous, divided into one block
// per warp, with 128 values per m16n8 tile.
//   sm_90 and newer: a lane's four values are adjacent, added by one instruction
//   older:           value i of all lanes is adjacent
#pragma once

#include "jitattn/ptx/global.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <int kArch>
struct DqFragments {
  static constexpr bool kHasWideAdd = kArch >= 90;
  static constexpr int kTile = 128;

  __device__ static void load(float (&value)[4], const float* g_tile, int lane_idx) {
    if constexpr (kHasWideAdd) {
      const float4 all = *reinterpret_cast<const float4*>(g_tile + lane_idx * 4);
      value[0] = all.x, value[1] = all.y, value[2] = all.z, value[3] = all.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = g_tile[i * 32 + lane_idx];
    }
  }

  __device__ static void add(float* g_tile, const float (&value)[4], int lane_idx) {
    if constexpr (kHasWideAdd) {
      ptx::red_add_v4(g_tile + lane_idx * 4, value);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::red_add(g_tile + i * 32 + lane_idx, value[i]);
    }
  }
};

}  // namespace jitattn

// The m16n8 accumulator tile of mma.m16n8k16: four fp32 numbers, or two pairs of fp16. The first
// half belongs to row g, the second to row g + 8 (fragment.cuh).
#pragma once

#include "jitattn/ptx/math.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

using WideTile = float[4];
using NarrowTile = uint32_t[2];

template <class Tile>
constexpr bool kIsNarrow = sizeof(Tile) == sizeof(NarrowTile);

__device__ __forceinline__ void scale_row(WideTile& tile, int half, float factor) {
  tile[2 * half] *= factor;
  tile[2 * half + 1] *= factor;
}

__device__ __forceinline__ void scale_row(NarrowTile& tile, int half, float factor) {
  tile[half] = ptx::mul_f16x2(tile[half], ptx::pack_f16x2(factor, factor));
}

__device__ __forceinline__ float low_of(uint32_t pair) {
  return ptx::f16_to_f32(static_cast<uint16_t>(pair));
}
__device__ __forceinline__ float high_of(uint32_t pair) {
  return ptx::f16_to_f32(static_cast<uint16_t>(pair >> 16));
}

}  // namespace jitattn

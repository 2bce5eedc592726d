// Kernel      Converts dQ from its fp32 sums in fragment order (dq_fragments.cuh): scaled, rounded
//             to the dtype of q, and stored in its layout. (Row-order sums: sum_parts.cuh.)
//
// Work split  A warp: 16 rows of kColumnTiles tiles of 8 columns; four lanes share a row. For
//             16-bit outputs, each of these lanes writes one of four tiles, 16 bytes, if
//             aligned; otherwise pairs of columns.
#pragma once

#include "jitattn/bwd/sm80/dq_fragments.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/warp_grid.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void bwd_postprocess(const BwdPostprocessParams& params) {
  static_assert(sizeof(BwdPostprocessParams) == Spec::kParamsBytes,
                "host and device disagree on BwdPostprocessParams");
  using Element = Scalar<Spec::kDtype>;
  using T = typename Element::type;
  constexpr int kDim = ceil_div(Spec::kHeadDim, 16) * 16;
  struct alignas(2 * sizeof(T)) Pair {
    T left, right;
  };
  auto row_of = [&](int64_t batch, int64_t position, int64_t head) {
    return static_cast<T*>(params.dq) + batch * params.dq_stride_batch +
           position * params.dq_stride_row + head * params.dq_stride_head;
  };
  const float scale = params.scale * (params.unscale == nullptr ? 1.f : __ldg(params.unscale));
  auto rounded = [&](float value) { return Element::round(value * scale); };

  using Grid = WarpGrid<Spec::kBlockQ, kDim, Spec::kWarpsDq, Spec::kNumWarps>;
  using Fragments = DqFragments<Spec::kArch>;
  constexpr int kTiles = Spec::kColumnTiles;
  constexpr int kAcross = kDim / 8 / kTiles;
  static_assert(kAcross * kTiles * 8 == kDim && Spec::kNumThreads % 32 == 0);
  constexpr int kUnits = Spec::kBlockQ / 16 * kAcross;  // per query tile
  const int lane_idx = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (Spec::kNumThreads / 32) +
                       static_cast<int>(threadIdx.x) / 32;
  const Division by_unit = divide(warp, kUnits);
  const int unit = static_cast<int>(by_unit.rest);
  const int q_tiles = ceil_div(params.first_position + params.len_q, Spec::kBlockQ);
  const Division by_q_tile = divide(by_unit.quotient, q_tiles);
  const Division by_head = divide(by_q_tile.quotient, params.heads_q);
  const int64_t q_tile = by_q_tile.rest, batch = by_head.quotient, head = by_head.rest;
  if (batch * params.len_q * params.heads_q >= params.num_rows) return;
  const int row_tile = unit / kAcross, first_tile = unit % kAcross * kTiles;
  // The grid position of the warp that summed them.
  const int warp_row = row_tile / Grid::kRowTiles, m = row_tile % Grid::kRowTiles;
  const float* g_sum = params.sum + batch * params.sum_stride_batch +
                       head * params.sum_stride_head +
                       q_tile * (Spec::kBlockQ * Grid::kPaddedColumns);
  float value[kTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int warp_column = (first_tile + t) / Grid::kColumnTiles;
    const int n = (first_tile + t) % Grid::kColumnTiles;
    const int warp_idx = warp_column * Spec::kWarpsDq + warp_row;
    const int tile = (warp_idx * Grid::kRowTiles + m) * Grid::kColumnTiles + n;
    Fragments::load(value[t], g_sum + tile * Fragments::kTile, lane_idx);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t position = q_tile * Spec::kBlockQ + row_tile * 16 +
                             accumulator_row(lane_idx, half) - params.first_position;
    const bool exists = position >= 0 && position < params.len_q;
    T* g_row = row_of(batch, position, head);
    if constexpr (sizeof(T) == 2 && kTiles == 4 && Spec::kHeadDim % 8 == 0) {
      Vec16 chunk;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        chunk.word[t] =
            Element::round_pair(value[t][2 * half] * scale, value[t][2 * half + 1] * scale);
      }
      transpose_in_fours(chunk.word, lane_idx);
      const int column = (first_tile + lane_idx % 4) * 8;
      if (exists && column < Spec::kHeadDim) *reinterpret_cast<Vec16*>(g_row + column) = chunk;
    } else {
      if (!exists) continue;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int column = (first_tile + t) * 8 + accumulator_column(lane_idx);
        if (column >= Spec::kHeadDim) continue;
        const Pair pair = {rounded(value[t][2 * half]), rounded(value[t][2 * half + 1])};
        if constexpr (Spec::kHeadDim % 2 == 0) {
          *reinterpret_cast<Pair*>(g_row + column) = pair;
        } else {
          g_row[column] = pair.left;
          if (column + 1 < Spec::kHeadDim) g_row[column + 1] = pair.right;
        }
      }
    }
  }
}

}  // namespace jitattn

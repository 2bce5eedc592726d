// What        dQ from its sums: scaled, rounded to the dtype of q, and put into its layout.
//
// Work split  A thread four values: of a fragment (dq_fragments.cuh), or of a row.
#pragma once

#include "jitattn/dq_fragments.cuh"
#include "jitattn/element.cuh"
#include "jitattn/enums.cuh"
#include "jitattn/params.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/warp_grid.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void dq_round(const RoundParams& params) {
  static_assert(sizeof(RoundParams) == Spec::kParamsBytes,
                "host and device disagree on RoundParams");
  using Element = Scalar<Spec::kDtype>;
  using T = typename Element::type;
  constexpr int kDim = ceil_div(Spec::kHeadDim, 16) * 16;
  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
  struct alignas(2 * sizeof(T)) Pair {
    T left, right;
  };
  auto row_of = [&](int64_t batch, int64_t position, int64_t head) {
    return static_cast<T*>(params.dq) + batch * params.dq_stride_batch +
           position * params.dq_stride_row + head * params.dq_stride_head;
  };
  auto rounded = [&](float value) { return Element::round(value * params.scale); };

  if constexpr (Spec::kInFragments == Switch::kOn) {
    // A lane's four values of one m16n8 tile.
    using Grid = WarpGrid<Spec::kBlockQ, kDim, Spec::kWarpsDq, Spec::kNumWarps>;
    using Fragments = DqFragments<Spec::kArch>;
    constexpr int kTiles = Spec::kBlockQ * kDim / Fragments::kTile;  // of a query tile
    const int lane_idx = static_cast<int>(thread % 32);
    const Division by_tile = divide(thread / 32, kTiles);
    const int tile = static_cast<int>(by_tile.rest);
    const int q_tiles = ceil_div(params.first_position + params.len_q, Spec::kBlockQ);
    const Division by_q_tile = divide(by_tile.quotient, q_tiles);
    const Division by_head = divide(by_q_tile.quotient, params.heads_q);
    const int64_t q_tile = by_q_tile.rest, batch = by_head.quotient, head = by_head.rest;
    if (batch * params.len_q * params.heads_q >= params.num_rows) return;
    const int row_tile = tile / (kDim / 8), column_tile = tile % (kDim / 8);
    // The warp that had it.
    const int warp_row = row_tile / Grid::kRowTiles, m = row_tile % Grid::kRowTiles;
    const int warp_column = column_tile / Grid::kColumnTiles, n = column_tile % Grid::kColumnTiles;
    const int warp_idx = warp_column * Spec::kWarpsDq + warp_row;
    const float* g_tile =
        params.sum + batch * params.sum_stride_batch + head * params.sum_stride_head +
        q_tile * (Spec::kBlockQ * Grid::kPaddedColumns) +
        ((warp_idx * Grid::kRowTiles + m) * Grid::kColumnTiles + n) * Fragments::kTile;
    float value[4];
    Fragments::load(value, g_tile, lane_idx);
    const int column = column_tile * 8 + accumulator_column(lane_idx);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t position = q_tile * Spec::kBlockQ + row_tile * 16 +
                               accumulator_row(lane_idx, half) - params.first_position;
      if (position < 0 || position >= params.len_q || column >= Spec::kHeadDim) continue;
      T* g_pair = row_of(batch, position, head) + column;
      const Pair pair = {rounded(value[2 * half]), rounded(value[2 * half + 1])};
      if constexpr (Spec::kHeadDim % 2 == 0) {
        *reinterpret_cast<Pair*>(g_pair) = pair;
      } else {
        g_pair[0] = pair.left;
        if (column + 1 < Spec::kHeadDim) g_pair[1] = pair.right;
      }
    }
  } else {
    constexpr int kQuads = ceil_div(Spec::kHeadDim, 4);
    const int64_t idx = thread / kQuads;
    if (idx >= params.num_rows) return;
    const Division by_head = divide(idx, params.heads_q);
    const Division by_row = divide(by_head.quotient, params.len_q);
    const int64_t batch = by_row.quotient, position = by_row.rest, head = by_head.rest;
    const float* g_row = params.sum + batch * params.sum_stride_batch +
                         position * params.sum_stride_row + head * params.sum_stride_head;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = static_cast<int>(thread % kQuads) * 4 + i;
      if (column < Spec::kHeadDim) row_of(batch, position, head)[column] = rounded(g_row[column]);
    }
  }
}

}  // namespace jitattn

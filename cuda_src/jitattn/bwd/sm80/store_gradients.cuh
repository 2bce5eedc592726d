// Stores dK and dV of a key block.
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/fine_stride.cuh"
#include "jitattn/bwd/sm80/key_rows.cuh"
#include "jitattn/bwd/sm80/parts.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/special.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Value of BwdParams::in_parts: fp32 parts that are added to.
constexpr int kAddedParts = 2;

// Writes a warp's part of dK or dV: row `row` of the key block to row row_of(row) from g_first on;
// fp32 parts may be added to.
template <Dtype kDtype, int kHeadDim, class Grid, int kRowTiles, int kColumnTiles, class RowOf>
__device__ __forceinline__ void store_gradient(const float (&r)[kRowTiles][kColumnTiles][4],
                                               const Grid& grid,
                                               typename Scalar<kDtype>::type* g_first,
                                               int64_t row_stride, int num_rows, RowOf row_of,
                                               float scale, bool adds, int lane_idx) {
  using Element = Scalar<kDtype>;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = grid.first_row + m * 16 + accumulator_row(lane_idx, half);
      if (row >= num_rows) continue;
      auto* g_row = g_first + static_cast<int64_t>(row_of(row)) * row_stride;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const int column = grid.first_column + n * 8 + accumulator_column(lane_idx);
        if (n >= grid.num_tiles) continue;
        float left = r[m][n][2 * half] * scale, right = r[m][n][2 * half + 1] * scale;
        if constexpr (kHeadDim % 2 == 0 && kDtype != Dtype::kFp32) {
          using Mma = MmaF32Acc<kDtype>;
          if (column < kHeadDim) {
            *reinterpret_cast<uint32_t*>(g_row + column) = Mma::pack(left, right);
          }
        } else {
          if (adds) {
            if (column < kHeadDim) left += Element::load(g_row[column]);
            if (column + 1 < kHeadDim) right += Element::load(g_row[column + 1]);
          }
          if (column < kHeadDim) g_row[column] = Element::round(left);
          if (column + 1 < kHeadDim) g_row[column + 1] = Element::round(right);
        }
      }
    }
  }
}

// Returns the number of keys of a kernel block that exist.
template <class Spec>
__device__ __forceinline__ int keys_in_block(const BwdParamsOf<Spec>& params,
                                             const Sequence& sequence, const KvTile& tile) {
  if constexpr (kGathersKeys<Spec>) {
    return GatheredKeys<Spec>(params, sequence, tile.kv_head * params.heads_per_kv, tile.tile)
        .num_keys();
  }
  return min_of(Spec::kBlockKv, sequence.len_kv - tile.tile * Spec::kBlockKv);
}

// Stores dK and dV of a key block, in the layout of k and v or, as fp32 parts, by split and
// sequence. Indices are derived again: the main loop has no registers to hold them.
template <class Spec, Dtype kDtype, class DkTiles, class GridDk, class DvTiles, class GridDv>
__device__ __forceinline__ void store_gradients(const BwdParamsOf<Spec>& params,
                                                const DkTiles& r_dk, const GridDk& grid_dk,
                                                float scale_dk, const DvTiles& r_dv,
                                                const GridDv& grid_dv, float scale_dv, bool adds,
                                                int lane_idx) {
  using T = typename Scalar<kDtype>::type;
  const KvTile tile = kv_tile_of<Spec>(params, ptx::cta_idx());
  const Sequence sequence = Sequence::of<Spec>(params, tile.batch);
  const int num_keys = keys_in_block<Spec>(params, sequence, tile);
  const auto key_of = keys_of_block<Spec>(params, sequence, tile.kv_head, tile.tile);
  const int64_t first_row = shares_rows<Spec>(params) ? 0 : sequence.kv_start;
  auto first_of = [&](void* gradient, int64_t split, int64_t batch, int64_t row, int64_t head) {
    return static_cast<T*>(gradient) + tile.split * split + tile.batch * batch + first_row * row +
           tile.kv_head * head;
  };
  store_gradient<kDtype, Spec::kHeadDim>(
      r_dk, grid_dk,
      first_of(params.dk, params.dk_stride_split, params.dk_stride_batch, params.dk_stride_row,
               params.dk_stride_head),
      params.dk_stride_row, num_keys, key_of, scale_dk, adds, lane_idx);
  store_gradient<kDtype, Spec::kHeadDimV>(
      r_dv, grid_dv,
      first_of(params.dv, params.dv_stride_split, params.dv_stride_batch, params.dv_stride_row,
               params.dv_stride_head),
      params.dv_stride_row, num_keys, key_of, scale_dv, adds, lane_idx);
}

}  // namespace jitattn

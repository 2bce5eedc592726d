// Grid of warps that share the result tile of a product.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

// Register tiles of a product [kRows, kColumns]: kWarps warps along the rows, the others along
// units of 16 columns.
template <int kRows, int kColumns, int kWarps, int kNumWarps>
struct WarpGrid {
  static constexpr int kWarpsAcross = kNumWarps / kWarps;
  static constexpr int kRowTiles = kRows / kWarps / 16;
  static constexpr int kUnits = kColumns / 16;
  static constexpr int kColumnTiles = 2 * ceil_div(kUnits, kWarpsAcross);
  static constexpr int kPaddedColumns = kWarpsAcross * kColumnTiles * 8;
  static_assert(kRowTiles * kWarps * 16 == kRows, "a warp owns a multiple of 16 rows");
  static_assert(kWarpsAcross * kWarps == kNumWarps && kColumns % 16 == 0);

  int first_row;
  int first_column;
  int num_tiles;  // column tiles that exist

  __device__ explicit WarpGrid(int warp_idx)
      : first_row(warp_idx % kWarps * (kRows / kWarps)),
        first_column(warp_idx / kWarps * (kColumnTiles * 8)),
        num_tiles(kUnits % kWarpsAcross == 0 ? kColumnTiles : kUnits * 2 - first_column / 8) {}
};

}  // namespace jitattn

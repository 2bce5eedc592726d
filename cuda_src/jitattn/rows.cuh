// Rows of a query tile: which query position and head each one is (GQA packing).
//
// The heads_per_tile query heads that read one kv head are packed head-fastest:
//   row = position * heads_per_tile + head_in_tile
// With heads_per_tile = 1 a row is a position.
#pragma once

#include "jitattn/params.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

struct RowMap {
  uint32_t div_mul;
  uint32_t div_shift;
  int heads_per_tile;
  int num_rows;  // len_q * heads_per_tile

  __device__ explicit RowMap(const FwdParams& params)
      : div_mul(params.row_div_mul),
        div_shift(params.row_div_shift),
        heads_per_tile(params.heads_per_tile),
        num_rows(params.len_q * params.heads_per_tile) {}

  __device__ int position(int row) const {
    const uint32_t n = row;
    return static_cast<int>((__umulhi(n, div_mul) + n) >> div_shift);
  }

  __device__ int head(int row, int position) const { return row - position * heads_per_tile; }
};

}  // namespace jitattn

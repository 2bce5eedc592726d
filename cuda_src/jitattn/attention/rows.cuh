// GQA packing: maps each row of a query tile to a query position and a head.
//
// The heads_per_tile query heads that read one kv head are packed head-fastest:
//   row = position * heads_per_tile + head_in_tile
// With heads_per_tile = 1 a row is a position.
#pragma once

#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

struct RowMap {
  uint32_t div_mul;
  uint32_t div_shift;
  int heads_per_tile;
  int num_rows;  // len_q * heads_per_tile

  __device__ RowMap(const FwdParams& params, int len_q)
      : div_mul(params.row_div_mul),
        div_shift(params.row_div_shift),
        heads_per_tile(params.heads_per_tile),
        num_rows(len_q * params.heads_per_tile) {}

  // Without packing: rows are positions, which the compiler then knows.
  __device__ explicit RowMap(int len_q)
      : div_mul(0), div_shift(0), heads_per_tile(1), num_rows(len_q) {}

  __device__ int position(int row) const { return divide(row, div_mul, div_shift); }

  __device__ int head(int row, int position) const { return row - position * heads_per_tile; }
};

}  // namespace jitattn

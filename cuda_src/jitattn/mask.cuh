// Hides the scores that a row may not see. Only boundary blocks come here.
#pragma once

#include "jitattn/rows.cuh"
#include "jitattn/schedule.cuh"
#include "jitattn/sequence.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// r_s: scores of rows first_row .. and keys first_key .. of this warp; hidden ones become -inf.
template <class Spec, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void mask_scores(float (&r_s)[kRowTiles][kKeyTiles][4],
                                            const FwdParams& params, const Sequence& sequence,
                                            const RowMap& rows, int first_row, int first_key,
                                            int lane_idx) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + accumulator_row(lane_idx, half);
      const int visible = visible_keys<Spec>(params, sequence, rows.position(row));
      const int limit = visible - first_key - accumulator_column(lane_idx);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = r_s[m][n][2 * half + i];
          score = n * 8 + i < limit ? score : -infinity();
        }
      }
    }
  }
}

}  // namespace jitattn

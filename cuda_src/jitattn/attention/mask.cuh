// Positional masks: sets hidden scores to -inf. Called for blocks with hidden scores only.
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// Sets hidden scores to -inf. r_s: scores of a warp's rows (tile/warp_rows.cuh) and of the keys
// first_key_idx ...
template <class Spec, class WarpRows, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void mask_scores(float (&r_s)[kRowTiles][kKeyTiles][4],
                                            const FwdParamsOf<Spec>& params,
                                            const Sequence& sequence, const RowMap& rows,
                                            int first_head, const WarpRows& warp_rows,
                                            int first_key_idx) {
  const int column = first_key_idx + accumulator_column(warp_rows.lane_idx);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = rows.position(warp_rows(m, half));
      const int limit = visible_keys<Spec>(params, sequence, position) - column;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = r_s[m][n][2 * half + i];
          score = n * 8 + i < limit ? score : -infinity();
        }
      }
      if constexpr (Spec::kMask == MaskKind::kWindow) {
        const int first = first_key<Spec>(params, sequence, first_head, position) - column;
        const int kept = params.keep_first - column;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = r_s[m][n][2 * half + i];
            score = n * 8 + i >= first || n * 8 + i < kept ? score : -infinity();
          }
        }
      }
      if constexpr (Spec::kMask == MaskKind::kLocalStride) {
        // A kernel block lies in one pattern block.
        const bool sees = is_kept<Spec>(params, first_head, first_key_idx) ||
                          first_key_idx >= first_key<Spec>(params, sequence, first_head, position);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = r_s[m][n][2 * half + i];
            score = sees ? score : -infinity();
          }
        }
      }
    }
  }
}

}  // namespace jitattn

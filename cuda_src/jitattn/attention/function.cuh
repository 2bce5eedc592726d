// Applies the traced function of a call to scores: Spec::Function, which the generated header has
// (jitattn/jit/functions.py). It sees a pair by its indices in the sequence.
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/function_math.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Whether scores change, and so have a slope.
template <class Spec>
constexpr bool changes_scores() {
  if constexpr (Spec::kHasFunction) return Spec::Function::kHasScore;
  return false;
}

// Calls `use(place, m, half, n, i)` for each score of a warp's rows (tile/warp_rows.cuh) and keys, with
// the place of its pair.
template <class Spec, int kRowTiles, int kKeyTiles, class WarpRows, class Use>
__device__ __forceinline__ void visit_pairs(const Sequence& sequence, const RowMap& rows,
                                            int batch_idx, int first_head,
                                            const WarpRows& warp_rows,
                                            const KeyColumns<Spec>& columns, const Use& use) {
  ScorePlace place;
  place.batch = batch_idx;
  place.shift = sequence.len_kv - static_cast<int>(matrix_row<Spec>(sequence, sequence.len_q));
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min_of(warp_rows(m, half), rows.num_rows - 1);
      const int position = rows.position(row);
      place.row = static_cast<int>(matrix_row<Spec>(sequence, position));
      place.head = first_head + rows.head(row, position);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const int key = columns(n);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          place.key = key + i;
          use(place, m, half, n, i);
        }
      }
    }
  }
}

// Replaces the scores of a warp's rows and keys by what the function makes of them, unscaled as
// before, and hides the pairs that it hides. kSlopes: r_slope becomes the derivative of the new
// scores, 0 where they are hidden; else it is not used. Where lists know whole blocks, the mask is
// evaluated in the others alone.
template <class Spec, bool kSlopes, class Slopes, class Params, class WarpRows, int kRowTiles,
          int kKeyTiles>
__device__ __forceinline__ void apply_function(float (&r_s)[kRowTiles][kKeyTiles][4],
                                               Slopes& r_slope, const Params& params,
                                               const Sequence& sequence, const RowMap& rows,
                                               int batch_idx, int first_head,
                                               const WarpRows& warp_rows,
                                               const KeyColumns<Spec>& columns) {
  using Function = typename Spec::Function;
  constexpr bool kHasScore = Function::kHasScore, kHasMask = Function::kHasMask;
  constexpr bool kMasksLater = knows_whole_blocks<Spec>();
  const float scale = params.scale_log2 * kLn2;
  auto hide = [&](const ScorePlace& place, float score) {
    if constexpr (kHasMask) return Function::sees(params, place, 0.f) ? score : -infinity();
    return score;
  };
  auto change = [&](const ScorePlace& place, int m, int half, int n, int i) {
    float& score = r_s[m][n][2 * half + i];
    float changed = score;
    if constexpr (kHasScore) {
      const float given = score * scale;
      changed = Function::score(params, place, given);
      if constexpr (kSlopes) {
        const float slope = Function::slope(params, place, given);
        r_slope[m][n][2 * half + i] = changed == -infinity() ? 0.f : slope;
      }
      changed *= params.inverse_scale;
    }
    score = kMasksLater ? changed : hide(place, changed);
  };
  auto mask = [&](const ScorePlace& place, int m, int half, int n, int i) {
    float& score = r_s[m][n][2 * half + i];
    score = hide(place, score);
  };
  if constexpr (kHasScore || !kMasksLater) {
    visit_pairs<Spec, kRowTiles, kKeyTiles>(sequence, rows, batch_idx, first_head, warp_rows,
                                            columns, change);
  }
  if constexpr (kMasksLater) {
    if (is_whole<Spec, kRowTiles, kKeyTiles>(params, sequence, rows, columns.s_listed, warp_rows)) {
      return;
    }
    visit_pairs<Spec, kRowTiles, kKeyTiles>(sequence, rows, batch_idx, first_head, warp_rows,
                                            columns, mask);
  }
}

}  // namespace jitattn

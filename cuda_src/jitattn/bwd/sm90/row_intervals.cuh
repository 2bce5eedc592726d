// Positional masks as seen from the keys: the rows that see a key are an interval. Scores are
// transposed here, [keys, rows]: the accumulators of wgmma hold S^T.
#pragma once

#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Rows [begin, end) of a sequence.
struct RowInterval {
  int begin;
  int end;
};

constexpr int kNoRow = 0x7fffffff;

// Whether rows may be too far behind a key to see it.
template <class Spec>
constexpr bool kHasLastRow = kHasGap<Spec>;

// Returns the rows that see a key, if no tensor hides it. head_idx: for the mask of its kv head.
template <class Spec>
__device__ __forceinline__ RowInterval rows_that_see(const FwdParamsOf<Spec>& params,
                                                     const Sequence& sequence, int head_idx,
                                                     int key) {
  RowInterval rows = {0, kNoRow};
  if (key >= sequence.len_kv) return {kNoRow, kNoRow};
  if constexpr (Spec::kMask != MaskKind::kFull) {
    rows.begin = max_of(0, key - sequence.diagonal);
  }
  if constexpr (Spec::kMask == MaskKind::kWindow) {
    if (sequence.left > kNoLeft && key >= params.keep_first) {
      const int64_t end = static_cast<int64_t>(key) - sequence.left + 1;
      rows.end = static_cast<int>(min_of<int64_t>(end, kNoRow));
    }
  }
  if constexpr (Spec::kMask == MaskKind::kLocalStride) {
    const LocalStride<Spec> pattern(params, head_idx);
    if (!pattern.is_dense && !pattern.is_on_stride(key)) {
      const int64_t end = pattern.end_of_local(key) - sequence.diagonal;
      rows.end = static_cast<int>(max_of<int64_t>(0, min_of<int64_t>(end, kNoRow)));
    }
  }
  return rows;
}

// Returns the query tiles with rows that see any of some keys. The keys of a local + stride pattern
// are of one of its blocks.
template <class Spec>
__device__ __forceinline__ TileRange tiles_that_see_any(const FwdParamsOf<Spec>& params,
                                                        const Sequence& sequence, int head_idx,
                                                        int first_key, int num_keys) {
  const int end_key = min_of(first_key + num_keys, sequence.len_kv);
  if (end_key <= first_key) return {0, 0};
  const int begin = rows_that_see<Spec>(params, sequence, head_idx, first_key).begin;
  int end = sequence.len_q;
  if constexpr (kHasLastRow<Spec>) {
    // A key that is kept is the first, and the last one is the last to leave the window.
    end = min_of(end, max_of(rows_that_see<Spec>(params, sequence, head_idx, first_key).end,
                             rows_that_see<Spec>(params, sequence, head_idx, end_key - 1).end));
  }
  if (begin >= end) return {0, 0};
  return {begin / Spec::kBlockQ, ceil_div(end, Spec::kBlockQ)};
}

// Returns the tiles whose rows all see all of some keys, by their positions alone.
template <class Spec>
__device__ __forceinline__ TileRange tiles_that_see_all(const FwdParamsOf<Spec>& params,
                                                        const Sequence& sequence, int head_idx,
                                                        int first_key, int num_keys) {
  const int last_key = first_key + num_keys - 1;
  const int begin = rows_that_see<Spec>(params, sequence, head_idx, last_key).begin;
  int end = kNoRow;
  if constexpr (kHasLastRow<Spec>) {
    // Of the keys that are not kept the first is the first to leave the window.
    int leaves = first_key;
    if constexpr (Spec::kMask == MaskKind::kWindow) leaves = max_of(leaves, params.keep_first);
    if (leaves <= last_key) end = rows_that_see<Spec>(params, sequence, head_idx, leaves).end;
  }
  return {begin / Spec::kBlockQ + (begin % Spec::kBlockQ != 0), end / Spec::kBlockQ};
}

// Sets the scores of hidden keys to -inf. r_s: scores of two keys of a lane, and rows first_row ...
template <class Spec, int kCount>
__device__ __forceinline__ void hide_rows(float (&r_s)[kCount], const RowInterval (&rows)[2],
                                          int first_row, int lane_idx) {
  const int own_row = first_row + accumulator_column(lane_idx);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int begin = rows[half].begin - own_row, end = rows[half].end - own_row;
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = r_s[n * 4 + half * 2 + i];
        const int row = n * 8 + i;
        const bool sees = row >= begin && (!kHasLastRow<Spec> || row < end);
        score = sees ? score : -infinity();
      }
    }
  }
}

}  // namespace jitattn

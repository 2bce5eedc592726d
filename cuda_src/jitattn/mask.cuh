// Hides the scores that a row may not see. Only blocks with hidden scores come here.
#pragma once

#include "jitattn/key_lists.cuh"
#include "jitattn/rows.cuh"
#include "jitattn/schedule.cuh"
#include "jitattn/sequence.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// Whether keys may be hidden anywhere, by a tensor.
template <class Spec>
constexpr bool kHasBoolMask = Spec::kKeyPadding == Switch::kOn || Spec::kDense == Switch::kOn;

// r_s: scores of rows first_row .. and keys first_key .. of this warp; hidden ones become -inf.
template <class Spec, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void mask_scores(float (&r_s)[kRowTiles][kKeyTiles][4],
                                            const FwdParamsOf<Spec>& params,
                                            const Sequence& sequence, const RowMap& rows,
                                            int batch_idx, int first_head, int first_row,
                                            int first_key_idx, const KeyColumns<Spec>& columns,
                                            int lane_idx) {
  const int column = first_key_idx + accumulator_column(lane_idx);
  if constexpr (Spec::kKeyPadding == Switch::kOn) {
    const uint8_t* g_padding = params.key_padding + batch_idx * params.key_padding_stride;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = columns(n) + i;
        const bool keeps = key < sequence.len_kv && __ldg(g_padding + key) != 0;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          r_s[m][n][i] = keeps ? r_s[m][n][i] : -infinity();
          r_s[m][n][i + 2] = keeps ? r_s[m][n][i + 2] : -infinity();
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + accumulator_row(lane_idx, half);
      const int position = rows.position(row);
      if constexpr (!kHasLists<Spec>) {
        const int limit = visible_keys<Spec>(params, sequence, position) - column;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = r_s[m][n][2 * half + i];
            score = n * 8 + i < limit ? score : -infinity();
          }
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
      if constexpr (Spec::kDense == Switch::kOn) {
        const int own_row = min_of(row, rows.num_rows - 1), own = rows.position(own_row);
        const int64_t head = first_head + rows.head(own_row, own);
        const uint8_t* g_dense = params.dense + batch_idx * params.dense_stride_batch +
                                 head * params.dense_stride_head +
                                 matrix_row<Spec>(sequence, own) * params.dense_stride_row;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int key = columns(n) + i;
            const bool keeps = key < sequence.len_kv && __ldg(g_dense + key) != 0;
            float& score = r_s[m][n][2 * half + i];
            score = keeps ? score : -infinity();
          }
        }
      }
    }
  }
}

}  // namespace jitattn

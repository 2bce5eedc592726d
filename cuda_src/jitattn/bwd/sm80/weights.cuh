// Recomputes the attention weights and their gradients for a query tile and a key block, in every
// backward kernel. A warp has the rows and keys of its grid position.
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/dropout.cuh"
#include "jitattn/attention/function.cuh"
#include "jitattn/attention/mask.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/score.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/fine_stride.cuh"
#include "jitattn/bwd/sm80/parts.cuh"
#include "jitattn/bwd/sm80/storage.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/warp_rows.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec, class Traits>
struct TileWeights {
  using Mma = typename Traits::Mma;
  static constexpr int kRowTiles = Traits::GridS::kRowTiles;
  static constexpr int kKeyTiles = Traits::GridS::kColumnTiles;
  static constexpr bool kIsCapped = Spec::kSoftcap == Switch::kOn;
  static constexpr bool kDrops = Spec::kDropout == Switch::kOn;
  static constexpr bool kHasSlopes = changes_scores<Spec>();
  using Scores = float[kRowTiles][kKeyTiles][4];

  // The location of this warp's scores.
  struct Tile {
    int batch_idx;
    int head_idx;
    int first_row;  // position of its first row
    int first_key;
    KeyColumns<Spec> columns;
    int lane_idx;
    BlockListHead window;       // lists
    bool is_on_stride = false;  // gathered keys
  };

  const BwdParamsOf<Spec>& params;
  const Sequence& sequence;
  const RowMap& rows;
  const Tile& tile;
  float r_slope[kIsCapped ? kRowTiles : 1][kIsCapped ? kKeyTiles : 1][4];  // 1 - tanh^2
  // Of the function of the call.
  float r_function[kHasSlopes ? kRowTiles : 1][kHasSlopes ? kKeyTiles : 1][4];
  KeptWeights<Spec, kRowTiles, kKeyTiles> kept;

  __device__ TileWeights(const BwdParamsOf<Spec>& params, const Sequence& sequence,
                         const RowMap& rows, const Tile& tile)
      : params(params), sequence(sequence), rows(rows), tile(tile) {}

  // Computes r_p, the weights before dropout, and r_dp = dO V^T. Lane addresses as fragment.cuh
  // gives them; s_lse: of the warp's first row. The scales undo those of split operands.
  template <bool kIsMasked>
  __device__ void compute(Scores& r_p, Scores& r_dp, uint32_t lane_q_addr, uint32_t lane_k_addr,
                          uint32_t lane_do_addr, uint32_t lane_v_addr, uint32_t s_lse,
                          float scale_qk = 1.f, float scale_dov = 1.f) {
    // ---- Scores
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) r_p[m][n][i] = r_dp[m][n][i] = 0.f;
      }
    }
    if constexpr (!kIsCapped) change(r_p);
    add_product<Traits::kDim>(r_p, lane_q_addr, lane_k_addr, scale_qk);
    if constexpr (kIsCapped) {
      cap_scores<Spec>(r_p, params);
      const float inverse = 1.f / params.softcap_out;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float tanh = r_p[m][n][i] * inverse;
            r_slope[m][n][i] = 1.f - tanh * tanh;
          }
        }
      }
      change(r_p);
    }
    if constexpr (Spec::kHasFunction) {
      apply_function<Spec, kHasSlopes>(r_p, r_function, params, sequence, rows, tile.batch_idx,
                                       tile.head_idx, warp_rows(), tile.columns);
    }
    if constexpr (kIsMasked) hide(r_p);

    // ---- Weights
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * 16 + accumulator_row(tile.lane_idx, half);
        const float neg_lse = -ptx::ld_shared_f32(s_lse + row * 4);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            r_p[m][n][i] = ptx::exp2_approx(fmaf(r_p[m][n][i], params.scale_log2, neg_lse));
          }
        }
      }
    }

    // ---- Their gradients
    add_product<Traits::kDimV>(r_dp, lane_do_addr, lane_v_addr, scale_dov);
    if constexpr (kDrops) {
      kept.draw(params, sequence, rows, tile.batch_idx, tile.head_idx, warp_rows(), tile.columns);
    }
  }

  // Returns the gradient of the score before the function, from a weight and its gradient.
  __device__ float d_score(float p, float d_p, float delta, float rest, int m, int half, int n,
                           int i) const {
    if constexpr (kDrops) d_p = dropped(d_p, m, half, n, i) * params.dropout_scale;
    float d_s = p * (d_p - delta);
    if constexpr (Traits::kHasSinks) d_s = p * (rest * d_p - delta);
    if constexpr (kHasSlopes) d_s *= r_function[m][n][2 * half + i];
    return d_s;
  }

  // Returns the factor that a sink leaves to the weights of a row; s_lse as above.
  __device__ static float sink_rest(uint32_t s_lse, int row) {
    if constexpr (Traits::kHasSinks)
      return ptx::ld_shared_f32(s_lse + (2 * Spec::kBlockQ + row) * 4);
    return 1.f;
  }

  // Applies dropout to a value: 0 if dropped.
  __device__ float dropped(float value, int m, int half, int n, int i) const {
    if constexpr (kDrops) return kept.keeps(m, half, n, i) ? value : 0.f;
    return value;
  }

  // Converts the gradient of a score to that of scale q k^T.
  __device__ float capped(float value, int m, int half, int n, int i) const {
    if constexpr (kIsCapped) return value * r_slope[m][n][2 * half + i];
    return value;
  }

  // Stores P and dS, from r_p and r_dp as compute() returns them.
  __device__ __forceinline__ void store(Scores& r_p, Scores& r_dp, uint32_t s_lse,
                                        const PartScales<Spec, Traits>& scales,
                                        const typename Traits::GridS& grid,
                                        const BwdStorage<Traits>& storage, int warp_idx) const {
    using LayoutP = typename Traits::LayoutP;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * 16 + accumulator_row(tile.lane_idx, half);
        const float delta = ptx::ld_shared_f32(s_lse + (Spec::kBlockQ + row) * 4);
        const float rest = sink_rest(s_lse, row);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          float p[2], d_s[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float whole = r_p[m][n][2 * half + i];
            p[i] = dropped(whole, m, half, n, i);
            if constexpr (Traits::kHasSinks) p[i] *= rest;
            d_s[i] = d_score(whole, r_dp[m][n][2 * half + i], delta, rest, m, half, n, i);
            d_s[i] = capped(d_s[i], m, half, n, i);
          }
          if constexpr (kSplitFp32<Spec>) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              r_p[m][n][2 * half + i] = p[i];
              r_dp[m][n][2 * half + i] = d_s[i];
            }
          } else {
            const int column = grid.first_column + n * 8 + accumulator_column(tile.lane_idx);
            Mma::template store_pair<LayoutP>(storage.p, grid.first_row + row, column, p[0], p[1]);
            Mma::template store_pair<LayoutP>(storage.ds, grid.first_row + row, column, d_s[0],
                                              d_s[1]);
          }
        }
      }
    }
    if constexpr (kSplitFp32<Spec>) {
      scales.store(r_p, r_dp, grid, storage.p, storage.ds, warp_idx, tile.lane_idx);
    }
  }

 private:
  __device__ WarpRows<16> warp_rows() const { return {tile.first_row, tile.lane_idx}; }

  template <int kDim>
  __device__ static void add_product(Scores& r, uint32_t lane_a_addr, uint32_t lane_b_addr,
                                     float scale) {
    if constexpr (kSplitFp32<Spec>) {
      Mma::template add_scaled_scores<kDim>(r, lane_a_addr, lane_b_addr, scale);
    } else {
      Mma::template add_scores<kDim>(r, lane_a_addr, lane_b_addr);
    }
  }

  __device__ void change(Scores& r_s) const {
    if constexpr (kAddsToScores<Spec>) {
      add_to_scores<Spec>(r_s, params, sequence, rows, tile.batch_idx, tile.head_idx, warp_rows(),
                          tile.columns, 0);
    }
  }

  __device__ void hide(Scores& r_s) const {
    if constexpr (kHasBlockLists<Spec>) {
      const uint32_t s_listed = tile.columns.s_listed;
      if (!sees_all_listed<Spec, kKeyTiles>(params, sequence, tile.window, s_listed, tile.first_row,
                                            tile.first_row + kRowTiles * 16 - 1)) {
        mask_listed<Spec>(r_s, params, sequence, rows, tile.window, s_listed, warp_rows());
      }
    } else if constexpr (kGathersKeys<Spec>) {
      mask_gathered<Spec>(r_s, params, sequence, rows, tile.columns, tile.is_on_stride,
                          tile.first_row, tile.lane_idx);
    } else {
      mask_scores<Spec>(r_s, params, sequence, rows, tile.head_idx, warp_rows(), tile.first_key);
    }
  }
};

}  // namespace jitattn

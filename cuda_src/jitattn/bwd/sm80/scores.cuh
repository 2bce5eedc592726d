// Kernel      Gradients of score modifications: of a bias, summed over its broadcast dimensions;
//             and sums of dS by distance, for relative biases and ALiBi slopes. Every number has
//             one writer and a fixed order: bitwise reproducible.
//
// Math        dS = P (dO V^T - delta), as in kernel.cuh; dbias = sum of dS
//
// Work split  kMatrix: a CTA has a tile [kBlockQ, kBlockKv] of the bias, for one of its batches and
//             heads, and visits all batches and heads that share it. kRow: a key block, and all
//             query tiles too. kDistance: all tiles along one diagonal, for one batch and head;
//             kBlockQ == kBlockKv.
//
// Shared      K, V, Q, dO; LSE and delta; a tile of dS.
// memory
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/operands.cuh"
#include "jitattn/bwd/sm80/score_tiles.cuh"
#include "jitattn/bwd/sm80/storage.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/bwd/sm80/weights.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
constexpr bool kSumsMatrix = Spec::kTarget == ScoreTarget::kMatrix;
template <class Spec>
constexpr bool kSumsDistance = Spec::kTarget == ScoreTarget::kDistance;

// The work of a CTA: a tile of the bias, a key block, or a diagonal of tiles.
template <class Spec>
struct ScoreWork {
  int kv_tile;
  int q_tile;    // kMatrix
  int diagonal;  // kDistance: kv tile - q tile
  int head;
  int batch;

  __device__ explicit ScoreWork(const BwdParamsOf<Spec>& params) {
    const int num_diagonals = params.num_q_tiles + params.num_kv_tiles - 1;
    int rest = blockIdx.x;
    auto take = [&](int count) {
      const int idx = rest % count;
      rest /= count;
      return idx;
    };
    kv_tile = take(kSumsDistance<Spec> ? num_diagonals : params.num_kv_tiles);
    q_tile = kSumsMatrix<Spec> ? take(params.num_q_tiles) : 0;
    head = take(params.target_heads);
    batch = rest;
    diagonal = kv_tile - (params.num_q_tiles - 1);
  }
};

// Sums dS over tiles, one batch and head at a time.
template <class Spec, class Traits>
struct ScoreSums {
  using Weights = TileWeights<Spec, Traits>;
  using Scores = typename Weights::Scores;
  static constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;
  static constexpr int kRowTiles = Weights::kRowTiles, kKeyTiles = Weights::kKeyTiles;
  static_assert(kBlockQ * kBlockKv * 4 <= 2 * Traits::kBytesP, "dS fits where P and dS would be");

  ScoreTiles<Spec, Traits>& tiles;
  const BwdParamsOf<Spec>& params;
  const BwdStorage<Traits>& storage;
  const typename Traits::GridS& grid;
  const int lane_idx;

  // Adds dS of one tile to r_sum, or along its diagonals to `sum`. Called by all threads.
  __device__ void add(int batch_idx, int head_idx, const Sequence& sequence, int q_tile,
                      int kv_tile, Scores& r_sum, float& sum) const {
    tiles.visit(batch_idx, head_idx, sequence, q_tile, kv_tile, [&](Weights& weights) {
      if (tiles.has_scores) add_scores(weights, r_sum);
      if constexpr (kSumsDistance<Spec>) add_diagonal(sum);
    });
  }

  // kDistance: writes this thread's diagonal sum for a batch and head. Diagonals of tiles alternate
  // between two buffers, so that their ranges of distances do not overlap.
  __device__ void store_distance(const ScoreWork<Spec>& own, int batch_idx, int head_idx,
                                 const Sequence& sequence, float value) const {
    const int diagonal = own.diagonal;
    const int offset = static_cast<int>(threadIdx.x) - (kBlockQ - 1);
    const int distance =
        diagonal * kBlockKv + offset - (sequence.len_kv - sequence.len_q) + params.len_kv;
    const int64_t row =
        (static_cast<int64_t>(diagonal & 1) * params.batch + batch_idx) * params.heads_q + head_idx;
    const int size = params.len_q + params.len_kv;
    if (threadIdx.x < kBlockQ + kBlockKv - 1 && distance >= 0 && distance < size) {
      params.dq_sum[row * size + distance] = value;
    }
  }

  // kMatrix: writes a warp's part of a tile of the bias gradient.
  template <class Bias>
  __device__ void store_matrix(typename Bias::type* g_bias, const ScoreWork<Spec>& own,
                               int first_position, const Scores& r_sum, float scale) const {
    if (!tiles.has_scores) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = own.q_tile * kBlockQ + grid.first_row + m * 16 +
                             accumulator_row(lane_idx, i / 2) - first_position;
        if (position < 0 || position >= params.len_q) continue;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          const int key = own.kv_tile * kBlockKv + grid.first_column + n * 8 +
                          accumulator_column(lane_idx) + i % 2;
          if (key < params.len_kv) {
            g_bias[position * params.dq_stride_row + key] = Bias::round(r_sum[m][n][i] * scale);
          }
        }
      }
    }
  }

  // kRow: writes the bias gradient of a key block, summed over rows. Called by all threads.
  template <class Bias>
  __device__ void store_row(typename Bias::type* g_bias, const ScoreWork<Spec>& own,
                            const Scores& r_sum, float scale) const {
    if (tiles.has_scores) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            ptx::st_shared_b32(s_addr(m, n, i), __float_as_uint(r_sum[m][n][i]));
          }
        }
      }
    }
    ptx::barrier_sync<Traits::kNumThreads>();
    const int column = threadIdx.x, key = own.kv_tile * kBlockKv + column;
    if (column < kBlockKv && key < params.len_kv) {
      float sum = 0.f;
      for (int row = 0; row < kBlockQ; ++row) {
        sum += ptx::ld_shared_f32(storage.p + (row * kBlockKv + column) * 4);
      }
      g_bias[key] = Bias::round(sum * scale);
    }
  }

 private:
  // Adds a warp's dS to r_sum; kDistance: stores it in shared memory.
  __device__ void add_scores(Weights& weights, Scores& r_sum) const {
    Scores r_p, r_dp;
    const uint32_t s_lse = storage.stats(0) + grid.first_row * 4;
    tiles.compute(weights, r_p, r_dp);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * 16 + accumulator_row(lane_idx, half);
        const float delta = ptx::ld_shared_f32(s_lse + (kBlockQ + row) * 4);
        const float rest = Weights::sink_rest(s_lse, row);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const float d_s =
                weights.d_score(r_p[m][n][i], r_dp[m][n][i], delta, rest, m, half, n, i % 2);
            if constexpr (kSumsDistance<Spec>) {
              ptx::st_shared_b32(s_addr(m, n, i), __float_as_uint(d_s));
            } else {
              r_sum[m][n][i] += d_s;
            }
          }
        }
      }
    }
  }

  // kDistance: adds the elements of dS on this thread's diagonal.
  __device__ void add_diagonal(float& sum) const {
    ptx::barrier_sync<Traits::kNumThreads>();                          // dS is written
    const int offset = static_cast<int>(threadIdx.x) - (kBlockQ - 1);  // column - row
#pragma unroll 4
    for (int row = max_of(0, -offset); row < min_of(kBlockQ, kBlockKv - offset); ++row) {
      sum += ptx::ld_shared_f32(storage.p + (row * kBlockKv + row + offset) * 4);
    }
  }

  // Returns the address of accumulator i of a warp's tile (m, n) in the fp32 tile of dS.
  __device__ uint32_t s_addr(int m, int n, int i) const {
    const int row = grid.first_row + m * 16 + accumulator_row(lane_idx, i / 2);
    const int column = grid.first_column + n * 8 + accumulator_column(lane_idx) + i % 2;
    return storage.p + (row * kBlockKv + column) * 4;
  }
};

template <class Spec>
__device__ __forceinline__ void attn_bwd_scores(const BwdParamsOf<Spec>& params) {
  using Traits = BwdTraits<Spec>;
  const ScoreWork<Spec> own(params);
  ScoreTiles<Spec, Traits> tiles(params);
  const ScoreSums<Spec, Traits> sums{tiles, params, tiles.storage, tiles.grid, tiles.lane_idx};

  typename TileWeights<Spec, Traits>::Scores r_sum = {};  // kMatrix, kRow
  float sum = 0.f;                                        // kDistance: for this thread's diagonal
  const float unscale = params.d_out_scale == nullptr ? 1.f : __ldg(params.d_out_scale + 1);
  const int end_batch = params.target_batch == 1 ? params.batch : own.batch + 1;
  const int end_head = params.target_heads == 1 ? params.heads_q : own.head + 1;
  int first_position = 0;
#pragma unroll 1
  for (int batch_idx = own.batch; batch_idx < end_batch; ++batch_idx) {
    const Sequence sequence = Sequence::of<Spec>(params, batch_idx);
    first_position = sequence.first_position;
#pragma unroll 1
    for (int head_idx = own.head; head_idx < end_head; ++head_idx) {
      if constexpr (kSumsMatrix<Spec>) {
        sums.add(batch_idx, head_idx, sequence, own.q_tile, own.kv_tile, r_sum, sum);
      } else {
        const int first = kSumsDistance<Spec> ? max_of(0, -own.diagonal) : 0;
        const int num_tiles = ceil_div(sequence.len_q, Spec::kBlockQ);
#pragma unroll 1
        for (int q_tile = first; q_tile < num_tiles; ++q_tile) {
          const int kv_tile = kSumsDistance<Spec> ? q_tile + own.diagonal : own.kv_tile;
          sums.add(batch_idx, head_idx, sequence, q_tile, kv_tile, r_sum, sum);
        }
        if constexpr (kSumsDistance<Spec>) {
          sums.store_distance(own, batch_idx, head_idx, sequence, sum * unscale);
        }
      }
    }
  }
  if constexpr (kSumsDistance<Spec>) return;

  using Bias = typename MatrixTraits<Spec>::Bias;
  auto* g_bias = reinterpret_cast<typename Bias::type*>(params.dq_sum) +
                 own.batch * params.dq_stride_batch + own.head * params.dq_stride_head;
  if constexpr (kSumsMatrix<Spec>) {
    sums.template store_matrix<Bias>(g_bias, own, first_position, r_sum, unscale);
  } else {
    sums.template store_row<Bias>(g_bias, own, r_sum, unscale);
  }
}

}  // namespace jitattn

// Kernel      Gradients of tensors that a traced function captures: sums of dS times the derivative
//             of the new score with respect to what it reads, for every element that it reads.
//
// Math        c = P (dO V^T - delta) f'(read), of a pair of query and key; sum[index(read)] += c
//
// Order       Which pairs read an element is not known, so sums are of integers, whose order is no
//             matter: round(c 2^k / 2^e). The first launch finds e, the exponent of the largest
//             |c| of a tensor; the second one adds. k leaves room for as many pairs as there are
//             (plan/score_gradients.py). An element that gets what is no number is set to
//             kNotANumber, and stays beyond all sums.
//
// Work split  A CTA has a key block of one batch and head, and visits all its query tiles. Its warps
//             leave dS, and the scores that the function is given, in shared memory; then a warp
//             has rows, and its lanes keys. What they add to one element, by the dependence of its
//             index, is added up before it is sent.
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/score.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/operands.cuh"
#include "jitattn/bwd/sm80/score_tiles.cuh"
#include "jitattn/bwd/sm80/storage.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

constexpr long long kNotANumber = 1ll << 62;

// 2^x, in two factors that fp32 has.
struct WidePower {
  float first, second;

  __device__ explicit WidePower(int x) : first(power(x)), second(power(x - clamped(x))) {}
  __device__ float times(float value) const { return value * first * second; }

 private:
  __device__ static int clamped(int x) { return min_of(max_of(x, -126), 127); }
  __device__ static float power(int x) { return __int_as_float((clamped(x) + 127) << 23); }
};

// Collects what a thread adds to elements. kColumns: keys of a lane.
template <class Spec, int kColumns>
struct CapturedSums {
  using Function = typename Spec::Function;
  static constexpr int kReads = Function::kReads;

  const BwdParamsOf<Spec>& params;
  const int lane_idx;
  float d_score;  // of the pair
  int column;     // of the pair, among kColumns
  float most[kReads];
  float tile_sum[kReads], row_sum[kReads], key_sum[kReads][kColumns];
  int64_t tile_at[kReads], row_at[kReads], key_at[kReads][kColumns];

  __device__ CapturedSums(const BwdParamsOf<Spec>& params, int lane_idx)
      : params(params), lane_idx(lane_idx) {
#pragma unroll
    for (int read = 0; read < kReads; ++read) {
      most[read] = tile_sum[read] = row_sum[read] = 0.f;
      tile_at[read] = row_at[read] = 0;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        key_sum[read][i] = 0.f;
        key_at[read][i] = 0;
      }
    }
  }

  __device__ bool measures() const { return params.captured_sums == nullptr; }

  // Adds the contribution of the pair to an element: called by Function::captured.
  template <int kRead, Varies kVaries>
  __device__ __forceinline__ void add(int64_t at, float derivative) {
    if ((params.captured_wanted >> Function::tensor_of(kRead) & 1) == 0) return;
    const float value = d_score == 0.f ? 0.f : d_score * derivative;
    if (measures()) {
      const float size = fabsf(value);
      most[kRead] = fmaxf(most[kRead], size < infinity() ? size : 0.f);
    } else if constexpr (kVaries == Varies::kNever) {
      tile_sum[kRead] += value;
      tile_at[kRead] = at;
    } else if constexpr (kVaries == Varies::kByRow) {
      row_sum[kRead] += value;
      row_at[kRead] = at;
    } else if constexpr (kVaries == Varies::kByKey) {
      key_sum[kRead][column] += value;
      key_at[kRead][column] = at;
    } else {
      send(kRead, at, value);
    }
  }

  // Sends the sums of a warp's row.
  __device__ __forceinline__ void end_row() {
#pragma unroll
    for (int read = 0; read < kReads; ++read) {
      if (Function::varies(read) != Varies::kByRow) continue;
      const float sum = over_warp(row_sum[read]);
      if (lane_idx == 0) send(read, row_at[read], sum);
      row_sum[read] = 0.f;
    }
  }

  // Sends the sums of all query tiles.
  __device__ __forceinline__ void end() {
#pragma unroll
    for (int read = 0; read < kReads; ++read) {
      if (measures()) {
        float largest = most[read];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        }
        uint32_t* g_most = params.captured_most + Function::tensor_of(read);
        if (lane_idx == 0) atomicMax(g_most, __float_as_uint(largest));
      } else if (Function::varies(read) == Varies::kNever) {
        const float sum = over_warp(tile_sum[read]);
        if (lane_idx == 0) send(read, tile_at[read], sum);
      } else if (Function::varies(read) == Varies::kByKey) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) send(read, key_at[read][i], key_sum[read][i]);
      }
    }
  }

 private:
  __device__ static float over_warp(float sum) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }

  __device__ void send(int read, int64_t at, float value) const {
    if (value == 0.f) return;
    auto* g_sum = reinterpret_cast<unsigned long long*>(params.captured_sums + at);
    if (!(fabsf(value) < infinity())) {
      atomicExch(g_sum, static_cast<unsigned long long>(kNotANumber));
      return;
    }
    const uint32_t bits = __ldg(params.captured_most + Function::tensor_of(read));
    const WidePower up(params.captured_bits - (static_cast<int>(bits >> 23) - 126));
    atomicAdd(g_sum,
              static_cast<unsigned long long>(static_cast<long long>(rintf(up.times(value)))));
  }
};

// Sums over the tiles of a CTA.
template <class Spec, class Traits>
struct CapturedTiles {
  using Weights = TileWeights<Spec, Traits>;
  using Scores = typename Weights::Scores;
  using Function = typename Spec::Function;
  static constexpr int kRowTiles = Weights::kRowTiles, kKeyTiles = Weights::kKeyTiles;
  static constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;
  static constexpr int kLaneKeys = ceil_div(kBlockKv, 32);
  using Sums = CapturedSums<Spec, kLaneKeys>;
  static_assert(!kSplitFp32<Spec> && kBlockQ * kBlockKv * 4 <= 2 * Traits::kBytesP);

  const ScoreTiles<Spec, Traits>& tiles;
  float* const s_given;  // scores; dS takes the place of P and dS of other kernels
  Sums& sums;

  // Adds a tile's contributions. Called by all threads.
  __device__ void add(Weights& weights) const {
    if (tiles.has_scores) store(weights);
    ptx::barrier_sync<Traits::kNumThreads>();
    const BwdParamsOf<Spec>& params = sums.params;
    const Sequence& sequence = weights.sequence;
    const auto& tile = weights.tile;
    const int first_row = tile.first_row - tiles.grid.first_row;
    const int first_key = tile.first_key - tiles.grid.first_column;
    const float scale = params.scale_log2 * kLn2;
    ScorePlace place;
    place.batch = tile.batch_idx;
    place.head = tile.head_idx;
    place.shift = sequence.len_kv - static_cast<int>(matrix_row<Spec>(sequence, sequence.len_q));
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < kBlockQ; row += Traits::kNumThreads / 32) {
      const int position =
          weights.rows.position(min_of(first_row + row, weights.rows.num_rows - 1));
      place.row = static_cast<int>(matrix_row<Spec>(sequence, position));
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        const int column = i * 32 + tiles.lane_idx;
        if (column >= kBlockKv) continue;
        const KeyColumns<Spec> columns = {(kHasBlockLists<Spec> ? 0 : first_key) + column % 8,
                                          tiles.storage.listed(0)};
        place.key = columns(column / 8);
        sums.d_score = ptx::ld_shared_f32(tiles.storage.p + 4 * offset(row, column));
        sums.column = i;
        float given = 0.f;
        if constexpr (Function::kDerivesFromScore) {
          given = s_given[offset(row, column)] * scale;
        }
        Function::captured(params, place, given, sums);
      }
      sums.end_row();
    }
  }

 private:
  // Where a pair lies in a tile of fp32. Columns are permuted, as eight rows are stored at once.
  __device__ static int offset(int row, int column) {
    return row * kBlockKv + (column ^ row % 8 * 8 % kBlockKv);
  }

  // Leaves a warp's dS and scores in shared memory.
  __device__ void store(Weights& weights) const {
    Scores r_p, r_dp, r_given;
    tiles.compute(weights, r_p, r_dp);
    compute_given(weights, r_given);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * 16 + accumulator_row(tiles.lane_idx, half);
        const float delta = ptx::ld_shared_f32(tiles.s_lse() + (kBlockQ + row) * 4);
        const float rest = Weights::sink_rest(tiles.s_lse(), row);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float p = r_p[m][n][2 * half + i];
            float d_p = r_dp[m][n][2 * half + i];
            if constexpr (Weights::kDrops) {
              d_p = weights.dropped(d_p, m, half, n, i) * tiles.params.dropout_scale;
            }
            if constexpr (Traits::kHasSinks) d_p *= rest;
            const float d_score = p == 0.f ? 0.f : p * (d_p - delta);
            const int column =
                tiles.grid.first_column + n * 8 + accumulator_column(tiles.lane_idx) + i;
            const int at = offset(tiles.grid.first_row + row, column);
            ptx::st_shared_b32(tiles.storage.p + 4 * at, __float_as_uint(d_score));
            if constexpr (Function::kDerivesFromScore) {
              s_given[at] = r_given[m][n][2 * half + i];
            }
          }
        }
      }
    }
  }

  // Computes the scores that the function is given, which weights do not keep.
  __device__ void compute_given(const Weights& weights, Scores& r_given) const {
    if constexpr (!Function::kDerivesFromScore) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) r_given[m][n][i] = 0.f;
      }
    }
    if constexpr (!Weights::kIsCapped) change(weights, r_given);
    Weights::Mma::template add_scores<Traits::kDim>(r_given, tiles.operands.lane_q_addr,
                                                    tiles.operands.lane_k_addr);
    if constexpr (Weights::kIsCapped) {
      cap_scores<Spec>(r_given, tiles.params);
      change(weights, r_given);
    }
  }

  __device__ void change(const Weights& weights, Scores& r_given) const {
    if constexpr (kAddsToScores<Spec>) {
      const auto& tile = weights.tile;
      add_to_scores<Spec>(r_given, tiles.params, weights.sequence, weights.rows, tile.batch_idx,
                          tile.head_idx, WarpRows<16>{tile.first_row, tiles.lane_idx}, tile.columns,
                          0);
    }
  }
};

template <class Spec>
__device__ __forceinline__ void attn_bwd_captured(const BwdParamsOf<Spec>& params) {
  using Traits = BwdTraits<Spec>;
  using Tiles = CapturedTiles<Spec, Traits>;
  constexpr int kGiven = Spec::Function::kDerivesFromScore ? Spec::kBlockQ * Spec::kBlockKv : 1;
  __shared__ float s_given[kGiven];
  int rest = blockIdx.x;
  const int kv_tile = rest % params.num_kv_tiles;
  rest /= params.num_kv_tiles;
  const int head_idx = rest % params.heads_q, batch_idx = rest / params.heads_q;
  ScoreTiles<Spec, Traits> tiles(params);
  typename Tiles::Sums sums(params, tiles.lane_idx);
  const Tiles captured{tiles, s_given, sums};
  const Sequence sequence = Sequence::of<Spec>(params, batch_idx);
  const int num_tiles = ceil_div(sequence.len_q, Spec::kBlockQ);
#pragma unroll 1
  for (int q_tile = 0; q_tile < num_tiles; ++q_tile) {
    tiles.visit(batch_idx, head_idx, sequence, q_tile, kv_tile,
                [&](typename Tiles::Weights& weights) { captured.add(weights); });
  }
  sums.end();
}

}  // namespace jitattn

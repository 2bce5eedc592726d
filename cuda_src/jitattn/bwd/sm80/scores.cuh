// What        Gradients of what is added to scores: of a bias, summed over the dimensions in which
// it
//             was broadcast; and sums of dS by distance, of which relative biases and ALiBi slopes
//             are made. Every number has one writer and one order: bitwise reproducible.
//
// Math        dS = P (dO V^T - delta), as in bwd_sm80.cuh; dbias = sum of dS
//
// Work split  kMatrix: a CTA has a tile [kBlockQ, kBlockKv] of the bias, for one of its batches and
//             heads, and goes through all that share it. kRow: a key block, and all query tiles
//             too. kDistance: all tiles along one diagonal, for one batch and head; kBlockQ ==
//             kBlockKv.
//
// Shared      K, V, Q, dO; LSE and delta; a tile of dS.
// memory
#pragma once

#include "jitattn/attention/key_lists.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/key_rows.cuh"
#include "jitattn/bwd/sm80/operands.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm80/storage.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/bwd/sm80/weights.cuh"
#include "jitattn/ptx/cp_async.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void attn_bwd_scores(const BwdParamsOf<Spec>& params) {
  using Traits = BwdTraits<Spec>;
  using Element = typename Traits::Element;
  using Weights = TileWeights<Spec>;
  using Scores = typename Weights::Scores;
  using LayoutQk = typename Traits::LayoutQk;
  using LayoutV = typename Traits::LayoutV;
  constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;
  constexpr int kRowTiles = Weights::kRowTiles, kKeyTiles = Weights::kKeyTiles;
  constexpr int kNumThreads = Traits::kNumThreads;
  static_assert(kBlockQ * kBlockKv * 4 <= 2 * Traits::kBytesP, "dS fits where P and dS would be");

  // ---- Indices
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const bool has_scores = warp_idx < Traits::kNumScoreWarps;
  const typename Traits::GridS grid(has_scores ? warp_idx : 0);
  const int num_diagonals = params.num_q_tiles + params.num_kv_tiles - 1;
  constexpr bool kIsMatrix = Spec::kTarget == ScoreTarget::kMatrix;
  constexpr bool kIsDistance = Spec::kTarget == ScoreTarget::kDistance;
  int rest = blockIdx.x;
  auto take = [&](int count) {
    const int idx = rest % count;
    rest /= count;
    return idx;
  };
  const int own_kv_tile = take(kIsDistance ? num_diagonals : params.num_kv_tiles);
  const int own_q_tile = kIsMatrix ? take(params.num_q_tiles) : 0;
  const int own_head = take(params.target_heads), own_batch = rest;
  const int diagonal = own_kv_tile - (params.num_q_tiles - 1);  // kv tile - q tile

  // ---- Shared storage
  const BwdStorage<Traits> storage;
  const uint32_t s_tile_addr = storage.p();  // of dS, in fp32
  const QueryCopies<Spec, Traits> query_copies(params);
  const KeyCopies<Spec, Traits> key_copies(params);
  key_copies.zero_padding(storage);
  query_copies.zero_padding(storage);
  const ScoreOperands<Traits> operands(storage, grid, lane_idx);

  float r_sum[kRowTiles][kKeyTiles][4] = {};  // kMatrix, kRow
  float sum = 0.f;                            // kDistance: of this thread's diagonal

  // Adds dS of one tile. All threads come here.
  auto step = [&](int batch_idx, int head_idx, const Sequence& sequence, int q_tile, int kv_tile) {
    const int first_key = kv_tile * kBlockKv, first_row = q_tile * kBlockQ;
    const int num_keys = min_of(kBlockKv, sequence.len_kv - first_key);
    const KeyBlock<Spec> keys(params, sequence, head_idx, kv_tile);
    if (num_keys <= 0) return;
    const TileRange range = keys.tiles();
    if (q_tile < range.begin || q_tile >= range.end) return;
    ListHead window = {};
    ListSpan span = {};
    int listed = 0;
    if constexpr (kHasLists<Spec>) {
      const int4 head = load_list_head<Spec>(params, sequence, head_idx);
      window = {head.y, head.z, head.w};
      span = listed_span(params, sequence, head, first_row);
      listed = span.before(first_key);
      const bool is_listed =
          listed < span.count && __ldg(span.g_groups + listed).x * 16 < first_key + num_keys;
      if (!is_listed) return;
    }
    const RowMap rows(sequence.len_q);
    const KeyRows<Spec> key_rows(params, sequence, batch_idx);
    ptx::barrier_sync<kNumThreads>();  // the last step's tiles are read
    key_copies.load(storage, sequence, key_rows, head_idx / params.heads_per_kv, kv_tile, num_keys);
    const QueryTiles<Spec, Traits> queries(params, sequence, query_copies, batch_idx, head_idx);
    queries.load_q(storage.q(0), q_tile);
    queries.load_d_out(storage.d_out(0), q_tile);
    ptx::cp_async_commit();
    for (int idx = threadIdx.x; idx < Traits::kRowStats * kBlockQ; idx += kNumThreads) {
      const float value = queries.load_stat(idx / kBlockQ, first_row + idx % kBlockQ);
      ptx::st_shared_b32(storage.stats(0) + idx * 4, __float_as_uint(value));
    }
    if constexpr (kHasLists<Spec>) {
      if (static_cast<int>(threadIdx.x) < kBlockKv / 16) {
        store_listed<kBlockKv>(storage.listed(0), span, listed, first_key);
      }
    }
    ptx::cp_async_wait<0>();
    ptx::barrier_sync<kNumThreads>();  // tiles, LSE and delta are there

    Scores r_p, r_dp;
    const uint32_t s_lse = storage.stats(0) + grid.first_row * 4;
    const KeyColumns<Spec> columns = {
        accumulator_column(lane_idx) + (kHasLists<Spec> ? 0 : first_key + grid.first_column),
        storage.listed(0) + grid.first_column / 16 * 8};
    const typename Weights::Tile where = {
        batch_idx, head_idx, first_row + grid.first_row, first_key + grid.first_column, columns,
        lane_idx,  window};
    Weights weights(params, sequence, rows, where);
    if (has_scores) {
      weights.template compute<true>(r_p, r_dp, operands.lane_q_addr, operands.lane_k_addr,
                                     operands.lane_do_addr, operands.lane_v_addr, s_lse);
    }
    if (has_scores) {
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
            for (int i = 0; i < 2; ++i) {
              const float d_s = weights.d_score(r_p[m][n][2 * half + i], r_dp[m][n][2 * half + i],
                                                delta, rest, m, half, n, i);
              if constexpr (kIsDistance) {
                const int column = grid.first_column + n * 8 + accumulator_column(lane_idx) + i;
                ptx::st_shared_b32(s_tile_addr + ((grid.first_row + row) * kBlockKv + column) * 4,
                                   __float_as_uint(d_s));
              } else {
                r_sum[m][n][2 * half + i] += d_s;
              }
            }
          }
        }
      }
    }
    if constexpr (kIsDistance) {
      ptx::barrier_sync<kNumThreads>();                                  // dS is there
      const int offset = static_cast<int>(threadIdx.x) - (kBlockQ - 1);  // column - row
#pragma unroll 4
      for (int row = max_of(0, -offset); row < min_of(kBlockQ, kBlockKv - offset); ++row) {
        sum += ptx::ld_shared_f32(s_tile_addr + (row * kBlockKv + row + offset) * 4);
      }
    }
  };

  // ---- All steps
  const float unscale = params.d_out_scale == nullptr ? 1.f : __ldg(params.d_out_scale + 1);
  const int end_batch = params.target_batch == 1 ? params.batch : own_batch + 1;
  const int end_head = params.target_heads == 1 ? params.heads_q : own_head + 1;
  int first_position = 0;
#pragma unroll 1
  for (int batch_idx = own_batch; batch_idx < end_batch; ++batch_idx) {
    const Sequence sequence = Sequence::of<Spec>(params, batch_idx);
    first_position = sequence.first_position;
#pragma unroll 1
    for (int head_idx = own_head; head_idx < end_head; ++head_idx) {
      if constexpr (kIsMatrix) {
        step(batch_idx, head_idx, sequence, own_q_tile, own_kv_tile);
      } else {
        const int first = kIsDistance ? max_of(0, -diagonal) : 0;
        const int num_tiles = ceil_div(sequence.len_q, kBlockQ);
#pragma unroll 1
        for (int q_tile = first; q_tile < num_tiles; ++q_tile) {
          step(batch_idx, head_idx, sequence, q_tile,
               kIsDistance ? q_tile + diagonal : own_kv_tile);
        }
        if constexpr (kIsDistance) {
          // The diagonals of every second pair of tiles do not overlap.
          const int offset = static_cast<int>(threadIdx.x) - (kBlockQ - 1);
          const int distance =
              diagonal * kBlockKv + offset - (sequence.len_kv - sequence.len_q) + params.len_kv;
          const int64_t row =
              (static_cast<int64_t>(diagonal & 1) * params.batch + batch_idx) * params.heads_q +
              head_idx;
          const int size = params.len_q + params.len_kv;
          if (threadIdx.x < kBlockQ + kBlockKv - 1 && distance >= 0 && distance < size) {
            params.dq_sum[row * size + distance] = sum * unscale;
          }
        }
      }
    }
  }
  if constexpr (kIsDistance) return;

  // ---- Write the bias gradient
  using Bias = typename MatrixTraits<Spec>::Bias;
  auto* g_bias = reinterpret_cast<typename Bias::type*>(params.dq_sum) +
                 own_batch * params.dq_stride_batch + own_head * params.dq_stride_head;
  const int first_key = own_kv_tile * kBlockKv;
  if constexpr (kIsMatrix) {
    if (!has_scores) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = own_q_tile * kBlockQ + grid.first_row + m * 16 +
                             accumulator_row(lane_idx, i / 2) - first_position;
        if (position < 0 || position >= params.len_q) continue;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          const int key =
              first_key + grid.first_column + n * 8 + accumulator_column(lane_idx) + i % 2;
          if (key < params.len_kv) {
            g_bias[position * params.dq_stride_row + key] = Bias::round(r_sum[m][n][i] * unscale);
          }
        }
      }
    }
  } else {
    if (has_scores) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = grid.first_row + m * 16 + accumulator_row(lane_idx, i / 2);
            const int column = grid.first_column + n * 8 + accumulator_column(lane_idx) + i % 2;
            ptx::st_shared_b32(s_tile_addr + (row * kBlockKv + column) * 4,
                               __float_as_uint(r_sum[m][n][i]));
          }
        }
      }
    }
    ptx::barrier_sync<kNumThreads>();
    const int column = threadIdx.x;
    if (column < kBlockKv && first_key + column < params.len_kv) {
      for (int row = 0; row < kBlockQ; ++row) {
        sum += ptx::ld_shared_f32(s_tile_addr + (row * kBlockKv + column) * 4);
      }
      g_bias[first_key + column] = Bias::round(sum * unscale);
    }
  }
}

}  // namespace jitattn

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
#include "jitattn/bwd/sm80/schedule.cuh"
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
  extern __shared__ __align__(128) unsigned char s_storage[];
  const uint32_t s_k_addr = ptx::shared_addr(s_storage);
  const uint32_t s_v_addr = s_k_addr + Traits::kOffsetV;
  const uint32_t s_q_addr = s_k_addr + Traits::kOffsetQ;
  const uint32_t s_do_addr = s_k_addr + Traits::kOffsetDo;
  const uint32_t s_stats_addr = s_k_addr + Traits::kOffsetStats;
  const uint32_t s_listed_addr = s_k_addr + Traits::kOffsetListed;
  const uint32_t s_tile_addr = s_k_addr + Traits::kOffsetP;  // of dS, in fp32

  const typename Traits::CopyQ copy_q(threadIdx.x, params.q_stride_row);
  const typename Traits::CopyDo copy_do(threadIdx.x, params.d_out_stride_row);
  const typename Traits::CopyK copy_k(threadIdx.x, params.k_stride_row);
  const typename Traits::CopyV copy_v(threadIdx.x, params.v_stride_row);
  copy_k.zero_padding(s_k_addr);
  copy_v.zero_padding(s_v_addr);
  copy_q.zero_padding(s_q_addr);
  copy_do.zero_padding(s_do_addr);
  const uint32_t lane_q_addr = s_q_addr + grid.first_row * LayoutQk::kRowBytes +
                               lane_offset_row_first<LayoutQk::kRowBytes / 16>(lane_idx);
  const uint32_t lane_do_addr = s_do_addr + grid.first_row * LayoutV::kRowBytes +
                                lane_offset_row_first<LayoutV::kRowBytes / 16>(lane_idx);
  const uint32_t lane_k_addr = s_k_addr + grid.first_column * LayoutQk::kRowBytes +
                               lane_offset_chunk_first<LayoutQk::kRowBytes / 16>(lane_idx);
  const uint32_t lane_v_addr = s_v_addr + grid.first_column * LayoutV::kRowBytes +
                               lane_offset_chunk_first<LayoutV::kRowBytes / 16>(lane_idx);

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
    auto start_of = [&](const void* tensor, int64_t batch, int64_t row, int64_t first, int64_t head,
                        int64_t idx) {
      return reinterpret_cast<const char*>(static_cast<const Element*>(tensor) + batch_idx * batch +
                                           first * row + idx * head);
    };
    auto load_rows = [&](const auto& copy, uint32_t s_addr, const char* g_first,
                         int64_t row_stride) {
      copy.template load_rows<true, false>(
          s_addr, copy.lane(g_first), sequence.len_q - first_row, [&](int skip) {
            const int row = max_of(first_row + copy.row + skip, sequence.first_position);
            return row * row_stride * static_cast<int64_t>(sizeof(Element));
          });
    };
    const KeyRows<Spec> key_rows(params, sequence, batch_idx);
    auto load_keys = [&](const auto& copy, uint32_t s_addr, const void* tensor, int64_t batch,
                         int64_t row, int64_t head) {
      const Element* g_head = static_cast<const Element*>(tensor) + head;
      if constexpr (kIsPaged<Spec>) {
        const char* g_lane = copy.lane(reinterpret_cast<const char*>(g_head));
        copy.template load_rows<true, false>(s_addr, g_lane, num_keys, [&](int skip) {
          return key_rows.offset(first_key + copy.row + skip, batch, row) *
                 static_cast<int64_t>(sizeof(Element));
        });
      } else {
        const Element* g_first = g_head + key_rows.offset(first_key, batch, row);
        copy.load_tail(s_addr, copy.share(reinterpret_cast<const char*>(g_first)), num_keys);
      }
    };
    ptx::barrier_sync<kNumThreads>();  // the last step's tiles are read
    const int64_t kv_head_idx = head_idx / params.heads_per_kv;
    load_keys(copy_k, s_k_addr, params.k, params.k_stride_batch, params.k_stride_row,
              params.k_stride_head * kv_head_idx);
    load_keys(copy_v, s_v_addr, params.v, params.v_stride_batch, params.v_stride_row,
              params.v_stride_head * kv_head_idx);
    load_rows(copy_q, s_q_addr,
              start_of(params.q, params.q_stride_batch, params.q_stride_row, sequence.q_start,
                       params.q_stride_head, head_idx),
              params.q_stride_row);
    load_rows(copy_do, s_do_addr,
              start_of(params.d_out, params.d_out_stride_batch, params.d_out_stride_row,
                       sequence.q_start, params.d_out_stride_head, head_idx),
              params.d_out_stride_row);
    ptx::cp_async_commit();
    const int64_t first_stat = batch_idx * params.stat_stride_batch +
                               head_idx * params.stat_stride_head + sequence.q_start;
    for (int idx = threadIdx.x; idx < Traits::kRowStats * kBlockQ; idx += kNumThreads) {
      const int stat = idx / kBlockQ, row = first_row + idx % kBlockQ;
      const bool exists = row < sequence.len_q && row >= sequence.first_position;
      const float* g_stats = stat == 0 ? params.lse_log2 : params.delta;
      if (Traits::kHasSinks && stat == 2) g_stats = params.sink_rest;
      const float value = exists ? __ldg(g_stats + first_stat + row) : stat == 0 ? infinity() : 0.f;
      ptx::st_shared_b32(s_stats_addr + idx * 4, __float_as_uint(value));
    }
    if constexpr (kHasLists<Spec>) {
      if (static_cast<int>(threadIdx.x) < kBlockKv / 16) {
        store_listed<kBlockKv>(s_listed_addr, span, listed, first_key);
      }
    }
    ptx::cp_async_wait<0>();
    ptx::barrier_sync<kNumThreads>();  // tiles, LSE and delta are there

    Scores r_p, r_dp;
    const uint32_t s_lse = s_stats_addr + grid.first_row * 4;
    const KeyColumns<Spec> columns = {
        accumulator_column(lane_idx) + (kHasLists<Spec> ? 0 : first_key + grid.first_column),
        s_listed_addr + grid.first_column / 16 * 8};
    const typename Weights::Tile where = {
        batch_idx, head_idx, first_row + grid.first_row, first_key + grid.first_column, columns,
        lane_idx,  window};
    Weights weights(params, sequence, rows, where);
    if (has_scores) {
      weights.template compute<true>(r_p, r_dp, lane_q_addr, lane_k_addr, lane_do_addr, lane_v_addr,
                                     s_lse);
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

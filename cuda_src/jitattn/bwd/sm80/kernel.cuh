// What        Gradients of q, k and v on mma.sync, ldmatrix and cp.async: sm_80 and every newer
// GPU.
//
// Math        P = exp2(S * scale_log2 - lse_log2), with the very S of the forward kernel
//             dV += P^T dO
//             dS = P (dO V^T - delta),  with softcap times 1 - tanh^2
//             dK += scale dS^T Q,  dQ += scale dS K
//
// Paper       Dao, FlashAttention-2, arXiv:2307.08691, Algorithm 2. We differ in: query heads of a
//             kv head are visited by one CTA, so that dK and dV have one writer; the query tiles of
//             a key block follow from the mask (bwd_schedule.cuh).
//
// Work split  One CTA: kBlockKv keys of one kv head, whose dK and dV stay in registers, and all
//             query tiles that see them, or one of num_q_splits parts of these, of all query heads.
//             Each product has its own grid of warps (warp_grid.cuh).
//
// Shared      K, V for the whole run; Q and dO, kStages of each; P and dS, through which the scores'
// memory      grid of warps hands over to the others; LSE and delta of the rows.
//
// Pipeline    kStages == 2: the copies of tile i + 1 start with step i; two barriers a step.
//               step i | wait i | barrier | start i+1 | S dP -> P dS | barrier | dV  dQ  dK |
//             kStages == 1: dO of the next tile lands under dQ and dK, Q is waited for; four.
//
// dQ          Every key block adds to the sums of dQ in global memory (bwd_traits.cuh), in any
//             order; or, with kDeterministic, in the order of the keys: blocks wait for their
//             turns. All blocks of a head are started in that order, so those waited for are
//             running.
//
// dK, dV      Rounded and written; or, where query tiles are split or sequences share keys, left as
//             fp32 parts, which another kernel adds up in order (dq_round.cuh, kv_scatter.cuh).
//             Sums of very many steps would drift: tensor cores truncate.
#pragma once

#include "jitattn/attention/key_lists.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/dq_sums.cuh"
#include "jitattn/bwd/sm80/fine_stride.cuh"
#include "jitattn/bwd/sm80/key_rows.cuh"
#include "jitattn/bwd/sm80/operands.cuh"
#include "jitattn/bwd/sm80/parts.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm80/storage.cuh"
#include "jitattn/bwd/sm80/store_gradients.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/bwd/sm80/weights.cuh"
#include "jitattn/debug.cuh"
#include "jitattn/ptx/cp_async.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/special.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void attn_bwd(const BwdParamsOf<Spec>& params) {
  using Traits = BwdTraits<Spec>;
  using Mma = typename Traits::Mma;
  using Element = typename Traits::Element;
  using GridS = typename Traits::GridS;
  constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;
  constexpr int kRowTiles = GridS::kRowTiles, kKeyTiles = GridS::kColumnTiles;
  constexpr int kStages = Spec::kStages;
  using Weights = TileWeights<Spec>;
  using Products = TileProducts<Spec>;
  using Scores = typename Weights::Scores;

  // ---- Indices
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const KvTile tile_idx = kv_tile_of<Spec>(params, blockIdx.x);
  const int kv_tile = tile_idx.tile, kv_head_idx = tile_idx.kv_head, batch_idx = tile_idx.batch;
  const Sequence sequence = Sequence::of<Spec>(params, batch_idx);
  const int first_key = kv_tile * kBlockKv;  // of neighbouring keys
  using Keys = typename Conditional<kGathersKeys<Spec>, GatheredKeys<Spec>, KeyBlock<Spec>>::type;
  const int num_keys = keys_in_block<Spec>(params, sequence, tile_idx);
  if (num_keys <= 0) return;
  auto tiles_of = [&](const Keys& keys) {
    const TileRange seen = keys.tiles().within(params.first_q_tile, params.end_q_tile);
    return seen.part(kv_tile_of<Spec>(params, ptx::cta_idx()).split, params.num_q_splits);
  };
  if (params.in_parts == kAddedParts) {  // the heads of a kv head see alike
    const Keys keys(params, sequence, kv_head_idx * params.heads_per_kv, kv_tile);
    if (tiles_of(keys).is_empty()) return;
  }
  const KeyRows<Spec> key_rows(params, sequence, batch_idx);
  const RowMap rows(sequence.len_q);
  const GridS grid_s(warp_idx);
  const typename Traits::GridDk grid_dk(warp_idx);
  const typename Traits::GridDv grid_dv(warp_idx);
  const typename Traits::GridDq grid_dq(warp_idx);

  // ---- Shared storage
  const BwdStorage<Traits> storage;
  JITATTN_DEVICE_ASSERT(storage.k % 128 == 0);
  const PartScales<Spec> scales(params, batch_idx, kv_head_idx, first_key,
                                storage.k + Traits::kOffsetScales);

  const QueryCopies<Spec, Traits> query_copies(params);
  const ScoreOperands<Traits> operands(storage, grid_s, lane_idx);
  using LayoutQk = typename Traits::LayoutQk;
  using LayoutV = typename Traits::LayoutV;
  using LayoutP = typename Traits::LayoutP;

  // ---- K and V
  {
    const KeyCopies<Spec, Traits> copies(params);
    copies.zero_padding(storage);
    query_copies.zero_padding(storage);
    copies.load(storage, sequence, key_rows, kv_head_idx, kv_tile, num_keys);
  }

  // ---- Register tiles
  float r_dk[Traits::GridDk::kRowTiles][Traits::GridDk::kColumnTiles][4] = {};
  float r_dv[Traits::GridDv::kRowTiles][Traits::GridDv::kColumnTiles][4] = {};

#pragma unroll 1
  for (int group_head = 0; group_head < params.heads_per_kv; ++group_head) {
    const int head_idx = kv_head_idx * params.heads_per_kv + group_head;
    const Keys keys(params, sequence, head_idx, kv_tile);
    const TileRange range = tiles_of(keys);
    int first_keys[kGathersKeys<Spec> ? kKeyTiles / 2 : 1];  // of this warp's groups
    bool is_on_stride = false;
    if constexpr (kGathersKeys<Spec>) {
      is_on_stride = keys.is_on;
#pragma unroll
      for (int i = 0; i < kKeyTiles / 2; ++i) {
        first_keys[i] = keys.first_key_of_group(grid_s.first_column + i * 16);
      }
    }
    const QueryTiles<Spec, Traits> queries(params, sequence, query_copies, batch_idx, head_idx);
    auto load_q = [&](int buffer, int tile) { queries.load_q(storage.q(buffer), tile); };
    auto load_do = [&](int buffer, int tile) { queries.load_d_out(storage.d_out(buffer), tile); };

    // Statistics of a tile's rows, and its scales: fetched a step ahead, kept in registers until
    // there is room.
    constexpr int kNumRowStats = Traits::kRowStats * kBlockQ;
    constexpr int kNumStats = kNumRowStats + PartScales<Spec>::kPerTile;
    constexpr int kStatsPerThread = ceil_div(kNumStats, Traits::kNumThreads);
    float r_stats[kStatsPerThread];
    auto fetch_stats = [&](int tile) {
#pragma unroll
      for (int i = 0; i < kStatsPerThread; ++i) {
        const int idx = i * Traits::kNumThreads + threadIdx.x;
        const int stat = idx / kBlockQ;
        const int row = tile * kBlockQ + idx % kBlockQ;
        r_stats[i] = queries.load_stat(stat, row, idx < kNumRowStats);
        if (kNumStats > kNumRowStats && idx >= kNumRowStats && idx < kNumStats) {
          r_stats[i] = scales.load(params, batch_idx, head_idx, tile, idx - kNumRowStats);
        }
      }
    };
    auto keep_stats = [&](int stage) {
#pragma unroll
      for (int i = 0; i < kStatsPerThread; ++i) {
        const int idx = i * Traits::kNumThreads + threadIdx.x;
        if (idx < kNumStats) {
          ptx::st_shared_b32(storage.stats(stage) + idx * 4, __float_as_uint(r_stats[i]));
        }
      }
    };

    // ---- Lists: which tiles of a chunk have this key block in their list, and where
    constexpr int kChunk = kHasLists<Spec> ? Traits::kNumThreads : 0x40000000;
    int4 list_head = {};
    if constexpr (kHasLists<Spec>) list_head = load_list_head<Spec>(params, sequence, head_idx);
    auto span_of = [&](int tile) {
      if constexpr (kHasLists<Spec>) {
        return listed_span(params, sequence, list_head, tile * kBlockQ);
      }
    };
    // Tile `chunk + idx`: bit idx % 32 of word idx / 32 says whether its list has any of this key
    // block, the same of s_free_addr whether all rows see all of it; then what the list says.
    constexpr int kGroups = kBlockKv / 16;
    const uint32_t s_free_addr = storage.found + Traits::kBytesAny;
    auto s_bits_of = [&](int idx) {
      return storage.found + 2 * Traits::kBytesAny + idx * kGroups * 4;
    };
    // As key_lists.cuh wants it.
    auto keep_listed = [&](int stage, int tile, int chunk) {
      if constexpr (kHasLists<Spec>) {
        const int group = threadIdx.x;
        if (group >= kGroups) return;
        const uint64_t bits = ptx::ld_shared_b32(s_bits_of(tile - chunk) + group * 4);
        const int64_t entry = static_cast<int64_t>(bits << 32) | (first_key + group * 16);
        ptx::st_shared_b64(storage.listed(stage) + group * 8, entry);
      }
    };

#pragma unroll 1
    for (int chunk = range.begin; chunk < range.end; chunk += kChunk) {
      const int chunk_end = range.end - chunk > kChunk ? chunk + kChunk : range.end;
      if constexpr (kHasLists<Spec>) {
        const int tile = chunk + threadIdx.x;
        uint32_t bits[kGroups] = {};
        bool is_listed = false, sees_all = false;
        if (tile < chunk_end) {
          const ListSpan span = span_of(tile);
          const int last = min_of((tile + 1) * kBlockQ, sequence.len_q) - 1 + sequence.diagonal;
          const int first = max_of(tile * kBlockQ, sequence.first_position) + sequence.diagonal;
          const bool is_near =
              first_key <= last + list_head.y &&
              (first_key + num_keys > first + list_head.z || first_key < list_head.w);
          if (is_near) is_listed = load_listed_bits(bits, span, first_key, num_keys);
          sees_all = is_listed && num_keys == kBlockKv &&
                     first_key + kBlockKv - 1 <= first + list_head.y &&
                     (first_key >= last + list_head.z || first_key + kBlockKv <= list_head.w) &&
                     has_all_cells(bits, params.list_log2);
        }
        const uint32_t any = __ballot_sync(0xffffffffu, is_listed);
        const uint32_t all = __ballot_sync(0xffffffffu, sees_all);
        ptx::barrier_sync<Traits::kNumThreads>();  // the last chunk's are read
        if (lane_idx == 0) {
          ptx::st_shared_b32(storage.found + warp_idx * 4, any);
          ptx::st_shared_b32(s_free_addr + warp_idx * 4, all);
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          ptx::st_shared_b32(s_bits_of(threadIdx.x) + i * 4, bits[i]);
        }
        ptx::barrier_sync<Traits::kNumThreads>();
      }
      auto next_tile = [&](int tile) {
        if constexpr (kHasLists<Spec>) {
          for (int idx = tile - chunk; idx < chunk_end - chunk; idx = (idx / 32 + 1) * 32) {
            const uint32_t any = ptx::ld_shared_b32(storage.found + idx / 32 * 4) >> idx % 32;
            if (any != 0) return chunk + idx + __ffs(any) - 1;
          }
          return max_of(tile, chunk_end);
        }
        return tile;
      };
      auto is_free = [&](int tile) {
        if constexpr (kHasLists<Spec>) {
          const int idx = tile - chunk;
          return (ptx::ld_shared_b32(s_free_addr + idx / 32 * 4) >> idx % 32 & 1) != 0;
        }
        return keys.is_free(tile);
      };
      // Key blocks that a list leaves out still take their turns.
      auto wait_turn = [&](int tile, int turn) {
        wait_dq_turn<Spec>(params, batch_idx, head_idx, tile, turn);
      };
      auto end_turn = [&](int tile) { end_dq_turn<Spec>(params, batch_idx, head_idx, tile); };

      int stage = 0;  // of two: LSE, delta and lists; of kStages: Q and dO
      auto step = [&](int tile, int next, auto is_masked) {
        constexpr bool kIsMasked = decltype(is_masked)::value;
        const int buffer = kStages == 2 ? stage : 0;
        const uint32_t s_q_now = storage.q(buffer);
        const uint32_t s_do_now = storage.d_out(buffer);
        // Protects: this step's tiles before anyone reads them; the others, and P and dS, which the
        // last step read, before anyone writes them.
        ptx::cp_async_wait<0>();
        ptx::barrier_sync<Traits::kNumThreads>();
        const bool has_next = next < chunk_end;
        if (has_next) {
          if constexpr (kStages == 2) {
            load_q(stage ^ 1, next);
            load_do(stage ^ 1, next);
          }
          fetch_stats(next);
        }
        ptx::cp_async_commit();

        // ---- P and dS
        const int warp_row = tile * kBlockQ + grid_s.first_row;
        const int warp_key = first_key + grid_s.first_column;
        KeyColumns<Spec> columns = {accumulator_column(lane_idx) +
                                    (kHasGroups<Spec> ? 0 : warp_key)};
        if constexpr (kHasLists<Spec>) {
          columns.s_listed = storage.listed(stage) + grid_s.first_column / 16 * 8;
        }
        if constexpr (kGathersKeys<Spec>) {
#pragma unroll
          for (int i = 0; i < kKeyTiles / 2; ++i) columns.first_keys[i] = first_keys[i];
        }
        const uint32_t s_stats_now = storage.stats(stage);
        const uint32_t s_lse = s_stats_now + grid_s.first_row * 4;
        if (Traits::kNumScoreWarps == Traits::kNumWarps || warp_idx < Traits::kNumScoreWarps) {
          Scores r_p, r_dp;
          const ListHead window = {list_head.y, list_head.z, list_head.w};
          const typename Weights::Tile where = {batch_idx, head_idx, warp_row, warp_key,
                                                columns,   lane_idx, window,   is_on_stride};
          Weights weights(params, sequence, rows, where);
          weights.template compute<kIsMasked>(
              r_p, r_dp, operands.lane_q_addr + buffer * Traits::kBytesQ, operands.lane_k_addr,
              operands.lane_do_addr + buffer * Traits::kBytesDo, operands.lane_v_addr, s_lse,
              scales.of_q(s_stats_now) * scales.of_k, scales.of_d_out(s_stats_now) * scales.of_v);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = m * 16 + accumulator_row(lane_idx, half);
              const float delta = ptx::ld_shared_f32(s_lse + (kBlockQ + row) * 4);
              const float rest = Weights::sink_rest(s_lse, row);
#pragma unroll
              for (int n = 0; n < kKeyTiles; ++n) {
                float p[2], d_s[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  const float whole = r_p[m][n][2 * half + i];
                  p[i] = weights.dropped(whole, m, half, n, i);
                  if constexpr (Traits::kHasSinks) p[i] *= rest;
                  d_s[i] =
                      weights.d_score(whole, r_dp[m][n][2 * half + i], delta, rest, m, half, n, i);
                  d_s[i] = weights.capped(d_s[i], m, half, n, i);
                }
                if constexpr (kIsInHalves<Spec>) {
#pragma unroll
                  for (int i = 0; i < 2; ++i) {
                    r_p[m][n][2 * half + i] = p[i];
                    r_dp[m][n][2 * half + i] = d_s[i];
                  }
                } else {
                  const int column = grid_s.first_column + n * 8 + accumulator_column(lane_idx);
                  Mma::template store_pair<LayoutP>(storage.p, grid_s.first_row + row, column, p[0],
                                                    p[1]);
                  Mma::template store_pair<LayoutP>(storage.ds, grid_s.first_row + row, column,
                                                    d_s[0], d_s[1]);
                }
              }
            }
          }
          if constexpr (kIsInHalves<Spec>) {
            scales.store(r_p, r_dp, grid_s, storage.p, storage.ds, warp_idx, lane_idx);
          }
        }
        if (has_next) {
          keep_stats(stage ^ 1);
          keep_listed(stage ^ 1, next, chunk);
        }
        ptx::barrier_sync<Traits::kNumThreads>();  // P and dS are there

        // ---- dV, dQ, dK
        const float scale_dv = scales.of_d_out(s_stats_now) / PartScales<Spec>::kLiftP;
        Products::template add_transposed<LayoutV>(r_dv, storage.p, grid_dv, s_do_now, lane_idx,
                                                   [&](int, int) { return scale_dv; });
        if constexpr (kStages == 1) {
          ptx::barrier_sync<Traits::kNumThreads>();  // dO is read
          if (has_next) load_do(0, next);
          ptx::cp_async_commit();
        }
        {
          using Grid = typename Traits::GridDq;
          float r_dq[Grid::kRowTiles][Grid::kColumnTiles][4] = {};
          Products::template add<LayoutQk>(
              r_dq, storage.ds, grid_dq, storage.k, lane_idx, [&](int key, int m) {
                return scales.of_ds(grid_dq.first_row + m * 16, key) * scales.of_k;
              });
          wait_turn(tile, kHasLists<Spec> ? kv_tile : keys.turn(tile));
          add_dq<Spec>(params, sequence, r_dq, grid_dq, batch_idx, head_idx, tile, warp_idx,
                       lane_idx);
          end_turn(tile);
        }
        const float scale_q = scales.of_q(s_stats_now);
        Products::template add_transposed<LayoutQk>(
            r_dk, storage.ds, grid_dk, s_q_now, lane_idx, [&](int row, int m) {
              return scales.of_ds(row, grid_dk.first_row + m * 16) * scale_q;
            });
        if constexpr (kStages == 1) {
          ptx::barrier_sync<Traits::kNumThreads>();  // Q is read
          if (has_next) load_q(0, next);
          ptx::cp_async_commit();
        }
        stage ^= 1;
      };

      int tile = next_tile(chunk);
      if constexpr (kHasLists<Spec> && Spec::kDeterministic == Switch::kOn) {
        for (int skipped = chunk; skipped < tile; ++skipped) {
          wait_turn(skipped, kv_tile);
          end_turn(skipped);
        }
      }
      if (tile < chunk_end) {
        // The last step of the head before may still be reading.
        ptx::barrier_sync<Traits::kNumThreads>();
        load_q(0, tile);
        load_do(0, tile);
        fetch_stats(tile);
        keep_stats(0);
        keep_listed(0, tile, chunk);
      }
      ptx::cp_async_commit();
#pragma unroll 1
      while (tile < chunk_end) {
        const int next = next_tile(tile + 1);
        if (is_free(tile)) {
          step(tile, next, FalseType{});
        } else {
          step(tile, next, TrueType{});
        }
        if constexpr (kHasLists<Spec> && Spec::kDeterministic == Switch::kOn) {
          for (int skipped = tile + 1; skipped < next; ++skipped) {
            wait_turn(skipped, kv_tile);
            end_turn(skipped);
          }
        }
        tile = next;
      }
    }
  }

  // ---- Results
  if (params.in_parts) {
    store_gradients<Spec, Dtype::kFp32>(params, r_dk, grid_dk, 1.f, r_dv, grid_dv, 1.f,
                                        params.in_parts == kAddedParts, lane_idx);
  } else {
    const float unscale = params.d_out_scale == nullptr ? 1.f : __ldg(params.d_out_scale + 1);
    float scale_dv = unscale;
    if constexpr (Spec::kDropout == Switch::kOn) scale_dv *= params.dropout_scale;
    store_gradients<Spec, Spec::kDtype>(params, r_dk, grid_dk, params.scale * unscale, r_dv,
                                        grid_dv, scale_dv, false, lane_idx);
  }
}

}  // namespace jitattn

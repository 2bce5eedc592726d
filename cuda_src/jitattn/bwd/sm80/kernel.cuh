// Kernel      Gradients of q, k and v on mma.sync, ldmatrix and cp.async: sm_80 and newer.
//
// Math        P = exp2(S * scale_log2 - lse_log2), with S computed exactly as in the forward kernel
//             dV += P^T dO
//             dS = P (dO V^T - delta),  with softcap times 1 - tanh^2
//             dK += scale dS^T Q,  dQ += scale dS K
//
// Paper       Dao, FlashAttention-2, arXiv:2307.08691, Algorithm 2. We differ in: one CTA visits
//             all query heads of a kv head, so that dK and dV have one writer; the query tiles of
//             a key block follow from the mask (schedule.cuh).
//
// Work split  One CTA: kBlockKv keys of one kv head, whose dK and dV stay in registers, and all
//             query tiles that see them, or one of num_q_splits parts of these, of all query heads.
//             Each product has its own grid of warps (warp_grid.cuh).
//
// Shared      K, V for the whole run; Q and dO, kStages of each; P and dS, passed from the scores'
// memory      grid of warps to the others; LSE and delta of the rows.
//
// Pipeline    kStages == 2: the copies of tile i + 1 start with step i; two barriers a step.
//               step i | wait i | barrier | start i+1 | S dP -> P dS | barrier | dV  dQ  dK |
//             kStages == 1: dO of the next tile lands under dQ and dK, Q is waited for; four.
//
// dQ          Every key block adds to the sums of dQ in global memory (traits.cuh), in any order;
//             or, with kDeterministic, in key order, enforced by dq_semaphore. The blocks of a head
//             are launched in key order, so that a block only waits for running blocks.
//
// dK, dV      Rounded and written; or, if query tiles are split or sequences share keys, left as
//             fp32 parts, which another kernel adds in order (sum_parts.cuh, kv_scatter.cuh).
//             Sums over very many steps would drift: tensor cores truncate.
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/cta.cuh"
#include "jitattn/bwd/sm80/dq_sums.cuh"
#include "jitattn/bwd/sm80/fine_stride.cuh"
#include "jitattn/bwd/sm80/key_rows.cuh"
#include "jitattn/bwd/sm80/operands.cuh"
#include "jitattn/bwd/sm80/parts.cuh"
#include "jitattn/bwd/sm80/query_queue.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm80/storage.cuh"
#include "jitattn/bwd/sm80/store_gradients.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/debug.cuh"
#include "jitattn/ptx/cp_async.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/special.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
using BwdKeys = typename Conditional<kGathersKeys<Spec>, GatheredKeys<Spec>, KeyBlock<Spec>>::type;

// Returns the query tiles of this CTA for a key block.
template <class Spec>
__device__ __forceinline__ TileRange tiles_of_cta(const BwdParamsOf<Spec>& params,
                                                  const BwdKeys<Spec>& keys) {
  const TileRange seen = keys.tiles().within(params.first_q_tile, params.end_q_tile);
  return seen.part(kv_tile_of<Spec>(params, ptx::cta_idx()).split, params.num_q_splits);
}

// One query head of a CTA: visits its query tiles one after the other.
template <class Spec, class Traits>
struct BwdHead {
  using Cta = BwdCta<Spec, Traits>;
  using Keys = BwdKeys<Spec>;
  using Queue = QueryQueue<Spec, Traits, Keys>;
  static constexpr int kStages = Spec::kStages;
  // Statistics of a tile's rows (LSE, delta, sink factor), and its scales.
  static constexpr int kNumRowStats = Traits::kRowStats * Spec::kBlockQ;
  static constexpr int kNumStats = kNumRowStats + PartScales<Spec, Traits>::kPerTile;
  static constexpr int kStatsPerThread = ceil_div(kNumStats, Traits::kNumThreads);
  static constexpr bool kAdvancesSkipped =
      kHasBlockLists<Spec> && Spec::kDeterministic == Switch::kOn;

  const Cta& cta;
  const Keys& keys;
  const QueryTiles<Spec, Traits>& queries;
  const WarpKeys<Spec, Traits>& warp_keys;
  Queue& queue;

  // Visits the tiles of a chunk: the main loop.
  __device__ __forceinline__ void visit(int chunk, int chunk_end, typename Cta::DkTiles& r_dk,
                                        typename Cta::DvTiles& r_dv) {
    // Prefetched a step ahead, and held in registers until a buffer is free. NOTE: closures. As
    // member functions they make the main loop spill, since operands are passed in another order.
    float r_stats[kStatsPerThread];
    auto fetch_stats = [&](int tile) {
#pragma unroll
      for (int i = 0; i < kStatsPerThread; ++i) {
        const int idx = i * Traits::kNumThreads + threadIdx.x;
        const int stat = idx / Spec::kBlockQ;
        const int row = tile * Spec::kBlockQ + idx % Spec::kBlockQ;
        r_stats[i] = queries.load_stat(stat, row, idx < kNumRowStats);
        if (kNumStats > kNumRowStats && idx >= kNumRowStats && idx < kNumStats) {
          r_stats[i] = PartScales<Spec, Traits>::load(cta.params, queries.batch_idx,
                                                      queries.head_idx, tile, idx - kNumRowStats);
        }
      }
    };
    auto store_stats = [&](int stage) {
#pragma unroll
      for (int i = 0; i < kStatsPerThread; ++i) {
        const int idx = i * Traits::kNumThreads + threadIdx.x;
        if (idx < kNumStats) {
          ptx::st_shared_b32(cta.storage.stats(stage) + idx * 4, __float_as_uint(r_stats[i]));
        }
      }
    };
    queue.examine(chunk, chunk_end);
    int stage = 0;  // double-buffered LSE, delta and lists; Q and dO have kStages buffers
    int tile = queue.next(chunk);
    advance_skipped(chunk, tile);
    if (tile < chunk_end) {
      // The last step of the previous head may still be reading.
      ptx::barrier_sync<Traits::kNumThreads>();
      load_q(0, tile);
      load_d_out(0, tile);
      fetch_stats(tile);
      store_stats(0);
      queue.store_entries(0, tile);
    }
    ptx::cp_async_commit();
#pragma unroll 1
    while (tile < chunk_end) {
      const int next = queue.next(tile + 1);
      if (queue.is_free(tile)) {
        step<false>(fetch_stats, store_stats, tile, next, chunk_end, stage, r_dk, r_dv);
      } else {
        step<true>(fetch_stats, store_stats, tile, next, chunk_end, stage, r_dk, r_dv);
      }
      advance_skipped(tile + 1, next);
      tile = next;
    }
  }

 private:
  // Adds the products of a tile to dV, dQ and dK, while the next tile is copied.
  template <bool kIsMasked, class FetchStats, class StoreStats>
  __device__ void step(const FetchStats& fetch_stats, const StoreStats& store_stats, int tile,
                       int next, int chunk_end, int& stage, typename Cta::DkTiles& r_dk,
                       typename Cta::DvTiles& r_dv) {
    // Protects: this step's tiles before anyone reads them; the other buffers, and P and dS, which
    // the last step read, before anyone writes them.
    ptx::cp_async_wait<0>();
    ptx::barrier_sync<Traits::kNumThreads>();
    const bool has_next = next < chunk_end;
    if (has_next) {
      if constexpr (kStages == 2) {
        load_q(stage ^ 1, next);
        load_d_out(stage ^ 1, next);
      }
      fetch_stats(next);
    }
    ptx::cp_async_commit();

    cta.template compute_p_and_ds<kIsMasked>(queries.head_idx, tile, stage, warp_keys,
                                             queue.window());
    if (has_next) {
      store_stats(stage ^ 1);
      queue.store_entries(stage ^ 1, next);
    }
    ptx::barrier_sync<Traits::kNumThreads>();  // P and dS are written

    cta.add_dv(r_dv, stage);
    if constexpr (kStages == 1) {
      ptx::barrier_sync<Traits::kNumThreads>();  // dO has been read
      if (has_next) load_d_out(0, next);
      ptx::cp_async_commit();
    }
    cta.add_dq(keys, queries.head_idx, tile);
    cta.add_dk(r_dk, stage);
    if constexpr (kStages == 1) {
      ptx::barrier_sync<Traits::kNumThreads>();  // Q has been read
      if (has_next) load_q(0, next);
      ptx::cp_async_commit();
    }
    stage ^= 1;
  }

  __device__ void load_q(int buffer, int tile) const {
    queries.load_q(cta.storage.q(buffer), tile);
  }
  __device__ void load_d_out(int buffer, int tile) const {
    queries.load_d_out(cta.storage.d_out(buffer), tile);
  }

  // Advances the semaphore of tiles that a list excludes: other key blocks wait for this one.
  __device__ __forceinline__ void advance_skipped(int first, int end) const {
    if constexpr (kAdvancesSkipped) {
      for (int skipped = first; skipped < end; ++skipped) {
        wait_dq_semaphore<Spec, Traits>(cta.params, queries.batch_idx, queries.head_idx, skipped,
                                        keys.semaphore_value(skipped));
        release_dq_semaphore<Spec, Traits>(cta.params, queries.batch_idx, queries.head_idx,
                                           skipped);
      }
    }
  }
};

template <class Spec>
__device__ __forceinline__ void attn_bwd(const BwdParamsOf<Spec>& params) {
  using Traits = BwdTraits<Spec>;
  using Cta = BwdCta<Spec, Traits>;
  using Head = BwdHead<Spec, Traits>;
  using Keys = BwdKeys<Spec>;

  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const KvTile own = kv_tile_of<Spec>(params, blockIdx.x);
  const Sequence sequence = Sequence::of<Spec>(params, own.batch);
  const int first_key = own.tile * Spec::kBlockKv;
  const int num_keys = keys_in_block<Spec>(params, sequence, own);
  if (num_keys <= 0) return;
  if (params.in_parts == kAddedParts) {  // all heads of a kv head have the same mask
    const Keys keys(params, sequence, own.kv_head * params.heads_per_kv, own.tile);
    if (tiles_of_cta<Spec>(params, keys).is_empty()) return;
  }
  const KeyRows<Spec> key_rows(params, sequence, own.batch);
  const RowMap rows(sequence.len_q);
  const typename Traits::GridS grid_s(warp_idx);
  const typename Traits::GridDk grid_dk(warp_idx);
  const typename Traits::GridDv grid_dv(warp_idx);
  const typename Traits::GridDq grid_dq(warp_idx);
  const BwdStorage<Traits> storage;
  JITATTN_DEVICE_ASSERT(storage.k % 128 == 0);
  const PartScales<Spec, Traits> scales(params, own.batch, own.kv_head, first_key,
                                        storage.k + Traits::kOffsetScales);
  const QueryCopies<Spec, Traits> query_copies(params);
  const ScoreOperands<Traits> operands(storage, grid_s, lane_idx);
  const Cta cta{params, sequence, own,     first_key, warp_idx, lane_idx, rows,
                grid_s, grid_dk,  grid_dv, grid_dq,   storage,  scales,   operands};
  {
    const KeyCopies<Spec, Traits> copies(params);
    copies.zero_padding(storage);
    query_copies.zero_padding(storage);
    copies.load(storage, sequence, key_rows, own.kv_head, own.tile, num_keys);
  }

  typename Cta::DkTiles r_dk = {};
  typename Cta::DvTiles r_dv = {};
#pragma unroll 1
  for (int group_head = 0; group_head < params.heads_per_kv; ++group_head) {
    const int head_idx = own.kv_head * params.heads_per_kv + group_head;
    const Keys keys(params, sequence, head_idx, own.tile);
    const TileRange range = tiles_of_cta<Spec>(params, keys);
    const WarpKeys<Spec, Traits> warp_keys(keys, grid_s);
    const QueryTiles<Spec, Traits> queries(params, sequence, query_copies, own.batch, head_idx);
    typename Head::Queue queue(params, sequence, storage, keys, num_keys, head_idx);
    Head head{cta, keys, queries, warp_keys, queue};
#pragma unroll 1
    for (int chunk = range.begin; chunk < range.end; chunk += Head::Queue::kChunk) {
      const int chunk_end =
          range.end - chunk > Head::Queue::kChunk ? chunk + Head::Queue::kChunk : range.end;
      head.visit(chunk, chunk_end, r_dk, r_dv);
    }
  }

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

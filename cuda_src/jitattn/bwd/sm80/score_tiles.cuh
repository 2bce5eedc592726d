// Tiles of scores for kernels that sum their gradients: copies the operands of a tile, and recomputes
// its weights.
#pragma once

#include "jitattn/attention/block_lists.cuh"
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
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec, class Traits>
struct ScoreTiles {
  using Weights = TileWeights<Spec, Traits>;
  using Scores = typename Weights::Scores;
  static constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;

  // The list of a query tile: window, groups, and the first one in a tile's keys.
  struct Listed {
    BlockListHead window;
    BlockListSpan span;
    int first;  // index of the group
  };

  const BwdParamsOf<Spec>& params;
  const BwdStorage<Traits> storage;
  const KeyCopies<Spec, Traits> key_copies;
  const QueryCopies<Spec, Traits> query_copies;
  const bool has_scores;  // whether this warp has scores
  const int lane_idx;
  const typename Traits::GridS grid;
  const ScoreOperands<Traits> operands;
  int held_batch = -1, held_head = -1, held_tile = -1;  // of the K and V in shared memory

  __device__ explicit ScoreTiles(const BwdParamsOf<Spec>& params)
      : params(params),
        key_copies(params),
        query_copies(params),
        has_scores(threadIdx.x / 32 < Traits::kNumScoreWarps),
        lane_idx(threadIdx.x % 32),
        grid(has_scores ? threadIdx.x / 32 : 0),
        operands(storage, grid, lane_idx) {
    key_copies.zero_padding(storage);
    query_copies.zero_padding(storage);
  }

  // Calls `use(weights)` with the place of a warp's scores, once the operands of a tile are there, if
  // any of its rows may see a key. Called by all threads.
  template <class Use>
  __device__ void visit(int batch_idx, int head_idx, const Sequence& sequence, int q_tile,
                        int kv_tile, Use use) {
    const int first_key = kv_tile * kBlockKv, first_row = q_tile * kBlockQ;
    const int num_keys = min_of(kBlockKv, sequence.len_kv - first_key);
    const KeyBlock<Spec> keys(params, sequence, head_idx, kv_tile);
    if (num_keys <= 0 || !keys.tiles().has(q_tile)) return;
    Listed listed = {};
    if constexpr (kHasBlockLists<Spec>) {
      if (!find_listed(listed, sequence, head_idx, first_row, first_key, num_keys)) return;
    }
    const RowMap rows(sequence.len_q);
    const KeyRows<Spec> key_rows(params, sequence, batch_idx);
    ptx::barrier_sync<Traits::kNumThreads>();  // the last step's tiles have been read
    const int kv_head = head_idx / params.heads_per_kv;
    if (batch_idx != held_batch || kv_head != held_head || kv_tile != held_tile) {
      key_copies.load(storage, sequence, key_rows, kv_head, kv_tile, num_keys);
      held_batch = batch_idx;
      held_head = kv_head;
      held_tile = kv_tile;
    }
    load_queries(batch_idx, head_idx, sequence, q_tile);
    if constexpr (kHasBlockLists<Spec>) {
      if (static_cast<int>(threadIdx.x) < kBlockKv / 16) {
        store_listed<Spec>(storage.listed(0), listed.span, listed.first, first_key);
      }
    }
    ptx::cp_async_wait<0>();
    ptx::barrier_sync<Traits::kNumThreads>();  // tiles, LSE and delta are written

    const KeyColumns<Spec> columns = {
        accumulator_column(lane_idx) + (kHasBlockLists<Spec> ? 0 : first_key + grid.first_column),
        storage.listed(0) + grid.first_column / 16 * 8};
    const typename Weights::Tile where = {
        batch_idx, head_idx,     first_row + grid.first_row, first_key + grid.first_column, columns,
        lane_idx,  listed.window};
    Weights weights(params, sequence, rows, where);
    use(weights);
  }

  // Computes a warp's weights and their gradients.
  __device__ void compute(Weights& weights, Scores& r_p, Scores& r_dp) const {
    weights.template compute<true>(r_p, r_dp, operands.lane_q_addr, operands.lane_k_addr,
                                   operands.lane_do_addr, operands.lane_v_addr, s_lse());
  }

  // The LSE of a warp's first row; behind those of all rows, delta.
  __device__ uint32_t s_lse() const { return storage.stats(0) + grid.first_row * 4; }

 private:
  // Finds the keys of a block in the list of a query tile; false if there are none.
  __device__ bool find_listed(Listed& listed, const Sequence& sequence, int head_idx, int first_row,
                              int first_key, int num_keys) const {
    const int4 head = load_block_list_head<Spec>(params, sequence, head_idx);
    listed.window = {head.y, head.z, head.w};
    listed.span = listed_span(params, sequence, head, first_row);
    listed.first = listed.span.before(first_key);
    return listed.first < listed.span.count &&
           group_of(__ldg(listed.span.g_groups + listed.first)) * 16 < first_key + num_keys;
  }

  // Starts copying Q and dO, and stores the statistics of their rows.
  __device__ void load_queries(int batch_idx, int head_idx, const Sequence& sequence,
                               int q_tile) const {
    const QueryTiles<Spec, Traits> queries(params, sequence, query_copies, batch_idx, head_idx);
    queries.load_q(storage.q(0), q_tile);
    queries.load_d_out(storage.d_out(0), q_tile);
    ptx::cp_async_commit();
    for (int idx = threadIdx.x; idx < Traits::kRowStats * kBlockQ; idx += Traits::kNumThreads) {
      const float value = queries.load_stat(idx / kBlockQ, q_tile * kBlockQ + idx % kBlockQ);
      ptx::st_shared_b32(storage.stats(0) + idx * 4, __float_as_uint(value));
    }
  }
};

}  // namespace jitattn

// Backward CTA: the state of its key block while it visits query tiles, and the products of a tile:
// S and dP, which give P and dS; dV, dQ and dK.
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/dq_sums.cuh"
#include "jitattn/bwd/sm80/parts.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm80/storage.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/bwd/sm80/weights.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// The keys of a warp in the scores' grid, if gathered: groups of 16.
template <class Spec, class Traits>
struct WarpKeys {
  static constexpr int kGroups = kGathersKeys<Spec> ? Traits::GridS::kColumnTiles / 2 : 1;

  int first_keys[kGroups];
  bool is_on_stride = false;

  template <class Keys>
  __device__ __forceinline__ WarpKeys(const Keys& keys, const typename Traits::GridS& grid) {
    if constexpr (kGathersKeys<Spec>) {
      is_on_stride = keys.is_on;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        first_keys[i] = keys.first_key_of_group(grid.first_column + i * 16);
      }
    }
  }
};

template <class Spec, class Traits>
struct BwdCta {
  using GridS = typename Traits::GridS;
  using GridDk = typename Traits::GridDk;
  using GridDv = typename Traits::GridDv;
  using GridDq = typename Traits::GridDq;
  using DkTiles = float[GridDk::kRowTiles][GridDk::kColumnTiles][4];
  using DvTiles = float[GridDv::kRowTiles][GridDv::kColumnTiles][4];
  using LayoutQk = typename Traits::LayoutQk;
  using LayoutV = typename Traits::LayoutV;
  using Products = TileProducts<Spec, Traits>;
  using Scales = PartScales<Spec, Traits>;

  const BwdParamsOf<Spec>& params;
  const Sequence& sequence;
  const KvTile& own;
  const int& first_key;  // unless keys are gathered
  const int& warp_idx;
  const int& lane_idx;
  const RowMap& rows;
  const GridS& grid_s;
  const GridDk& grid_dk;
  const GridDv& grid_dv;
  const GridDq& grid_dq;
  const BwdStorage<Traits>& storage;
  const Scales& scales;
  const ScoreOperands<Traits>& operands;

  // Computes P and dS of a query tile and stores them in shared memory.
  template <bool kIsMasked>
  __device__ __forceinline__ void compute_p_and_ds(int head_idx, int tile, int stage,
                                                   const WarpKeys<Spec, Traits>& warp_keys,
                                                   const BlockListHead& window) const {
    using Weights = TileWeights<Spec, Traits>;
    const int buffer = Spec::kStages == 2 ? stage : 0;
    const int warp_row = tile * Spec::kBlockQ + grid_s.first_row;
    const int warp_key = first_key + grid_s.first_column;
    KeyColumns<Spec> columns = {accumulator_column(lane_idx) + (kHasGroups<Spec> ? 0 : warp_key)};
    if constexpr (kHasBlockLists<Spec>) {
      columns.s_listed = storage.listed(stage) + grid_s.first_column / 16 * 8;
    }
    if constexpr (kGathersKeys<Spec>) {
#pragma unroll
      for (int i = 0; i < GridS::kColumnTiles / 2; ++i) {
        columns.first_keys[i] = warp_keys.first_keys[i];
      }
    }
    const uint32_t s_stats = storage.stats(stage);
    const uint32_t s_lse = s_stats + grid_s.first_row * 4;
    if (Traits::kNumScoreWarps == Traits::kNumWarps || warp_idx < Traits::kNumScoreWarps) {
      typename Weights::Scores r_p, r_dp;
      const typename Weights::Tile where = {own.batch, head_idx, warp_row, warp_key,
                                            columns,   lane_idx, window,   warp_keys.is_on_stride};
      Weights weights(params, sequence, rows, where);
      weights.template compute<kIsMasked>(
          r_p, r_dp, operands.lane_q_addr + buffer * Traits::kBytesQ, operands.lane_k_addr,
          operands.lane_do_addr + buffer * Traits::kBytesDo, operands.lane_v_addr, s_lse,
          scales.of_q(s_stats) * scales.of_k, scales.of_d_out(s_stats) * scales.of_v);
      weights.store(r_p, r_dp, s_lse, scales, grid_s, storage, warp_idx);
    }
  }

  // dV += P^T dO
  __device__ __forceinline__ void add_dv(DvTiles& r_dv, int stage) const {
    const float scale = scales.of_d_out(storage.stats(stage)) / Scales::kLiftP;
    Products::template add_transposed<LayoutV>(r_dv, storage.p, grid_dv,
                                               storage.d_out(Spec::kStages == 2 ? stage : 0),
                                               lane_idx, [&](int, int) { return scale; });
  }

  // dQ += dS K, in global memory
  template <class Keys>
  __device__ __forceinline__ void add_dq(const Keys& keys, int head_idx, int tile) const {
    float r_dq[GridDq::kRowTiles][GridDq::kColumnTiles][4] = {};
    Products::template add<LayoutQk>(
        r_dq, storage.ds, grid_dq, storage.k, lane_idx, [&](int key, int m) {
          return scales.of_ds(grid_dq.first_row + m * 16, key) * scales.of_k;
        });
    wait_dq_semaphore<Spec, Traits>(params, own.batch, head_idx, tile, keys.semaphore_value(tile));
    add_dq_tile<Spec, Traits>(params, sequence, r_dq, grid_dq, own.batch, head_idx, tile, warp_idx,
                              lane_idx);
    release_dq_semaphore<Spec, Traits>(params, own.batch, head_idx, tile);
  }

  // dK += dS^T Q
  __device__ __forceinline__ void add_dk(DkTiles& r_dk, int stage) const {
    const float scale = scales.of_q(storage.stats(stage));
    Products::template add_transposed<LayoutQk>(
        r_dk, storage.ds, grid_dk, storage.q(Spec::kStages == 2 ? stage : 0), lane_idx,
        [&](int row, int m) { return scales.of_ds(row, grid_dk.first_row + m * 16) * scale; });
  }
};

}  // namespace jitattn

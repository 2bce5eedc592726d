// Scales of backward operands that are split into fp16 parts (tile/mma/f16_parts.cuh).
//
//   Q, K, V, dO   one per tile, written by the split_fp32 kernel
//   P             2^14, as in the forward kernel. P is at most 1, except for rounding of scores and
//                 LSE: at magnitudes of 1e7 it may exceed the range of fp16, and is clamped
//   dS            unbounded: each warp of the scores' grid scales its maximum into [2^13, 2^14) and
//                 stores the inverse in shared memory
#pragma once

#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/special.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/power_scale.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Products with a tile of P or dS, with scales where operands have them: scale_of(k, m), of rows or
// columns k .. of the tile and row tile m of the result.
template <class Spec, class Traits>
struct TileProducts {
  using Mma = typename Traits::Mma;
  using LayoutP = typename Traits::LayoutP;
  static constexpr int kWarpRows = Traits::GridS::kRowTiles * 16;  // of a warp of the scores' grid
  static constexpr int kWarpKeys = Traits::GridS::kColumnTiles * 8;

  // r += (tile)^T B
  template <class LayoutB, class Grid, int kRowTiles, int kColumnTiles, class ScaleOf>
  __device__ static void add_transposed(float (&r)[kRowTiles][kColumnTiles][4],
                                        uint32_t s_tile_addr, const Grid& grid, uint32_t s_b_addr,
                                        int lane_idx, ScaleOf scale_of) {
    if constexpr (kSplitFp32<Spec>) {
      Mma::template add_transposed_product<Spec::kBlockQ, kWarpRows, LayoutP, LayoutB>(
          r, s_tile_addr, grid.first_row, s_b_addr, grid.first_column, grid.num_tiles, lane_idx,
          scale_of);
    } else {
      Mma::template add_transposed_product<Spec::kBlockQ, LayoutP, LayoutB>(
          r, s_tile_addr, grid.first_row, s_b_addr, grid.first_column, grid.num_tiles, lane_idx);
    }
  }

  // r += (tile) B
  template <class LayoutB, class Grid, int kRowTiles, int kColumnTiles, class ScaleOf>
  __device__ static void add(float (&r)[kRowTiles][kColumnTiles][4], uint32_t s_tile_addr,
                             const Grid& grid, uint32_t s_b_addr, int lane_idx, ScaleOf scale_of) {
    if constexpr (kSplitFp32<Spec>) {
      Mma::template add_product<Spec::kBlockKv, kWarpKeys, LayoutP, LayoutB>(
          r, s_tile_addr, grid.first_row, s_b_addr, grid.first_column, grid.num_tiles, lane_idx,
          scale_of);
    } else {
      Mma::template add_product<Spec::kBlockKv, LayoutP, LayoutB>(
          r, s_tile_addr, grid.first_row, s_b_addr, grid.first_column, grid.num_tiles, lane_idx);
    }
  }
};

template <class Spec, class Traits>
struct PartScales {
  using GridS = typename Traits::GridS;
  using Products = TileProducts<Spec, Traits>;
  static constexpr float kLiftP = 16384.f;
  static constexpr float kMostP = 2.f;
  static constexpr int kPerTile = kSplitFp32<Spec> ? 2 : 0;  // one for Q, one for dO

  uint32_t s_of_ds_addr;
  float of_k;
  float of_v;

  __device__ PartScales(const BwdParamsOf<Spec>& params, int batch_idx, int kv_head_idx,
                        int first_key, uint32_t s_of_ds_addr)
      : s_of_ds_addr(s_of_ds_addr), of_k(1.f), of_v(1.f) {
    if constexpr (kSplitFp32<Spec>) {
      const int64_t heads_kv = params.heads_q / params.heads_per_kv;
      const int64_t idx =
          (batch_idx * heads_kv + kv_head_idx) * ceil_div(params.len_kv, kRowsPerScale) +
          first_key / kRowsPerScale;
      of_k = __ldg(params.k_scale + idx);
      of_v = __ldg(params.v_scale + idx);
    }
  }

  // Loads the scale of Q (0) or dO (1) of a query tile. They follow the statistics in shared
  // memory.
  __device__ static float load(const BwdParamsOf<Spec>& params, int batch_idx, int head_idx,
                               int tile, int which) {
    if constexpr (kSplitFp32<Spec>) {
      const int64_t head = static_cast<int64_t>(batch_idx) * params.heads_q + head_idx;
      const int64_t idx =
          head * ceil_div(params.len_q, kRowsPerScale) + tile * Spec::kBlockQ / kRowsPerScale;
      return __ldg((which == 0 ? params.q_scale : params.d_out_part_scale) + idx);
    }
    return 1.f;
  }
  __device__ static float of_q(uint32_t s_stats_addr) {
    return of_tile(s_stats_addr + Traits::kBytesRowStats);
  }
  __device__ static float of_d_out(uint32_t s_stats_addr) {
    return of_tile(s_stats_addr + Traits::kBytesRowStats + 4);
  }

  // Returns the scale of dS at a row and a key of the tile.
  __device__ float of_ds(int row, int key) const {
    const int warp = row / Products::kWarpRows + key / Products::kWarpKeys * Spec::kWarpsQ;
    return ptx::ld_shared_f32(s_of_ds_addr + warp * 4);
  }

  // Stores a warp's P and dS as hi and lo parts.
  template <int kRowTiles, int kKeyTiles>
  __device__ void store(const float (&r_p)[kRowTiles][kKeyTiles][4],
                        const float (&r_ds)[kRowTiles][kKeyTiles][4], const GridS& grid,
                        uint32_t s_p_addr, uint32_t s_ds_addr, int warp_idx, int lane_idx) const {
    using Mma = typename Traits::Mma;
    using LayoutP = typename Traits::LayoutP;
    // Derived again, so that addresses are not kept in registers from step to step.
    lane_idx = static_cast<int>(ptx::thread_idx() % 32);
    const PowerScale scale(most_of(r_ds));
    if (lane_idx == 0) {
      ptx::st_shared_b32(s_of_ds_addr + warp_idx * 4, __float_as_uint(scale.down));
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = grid.first_row + m * 16 + accumulator_row(lane_idx, half);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          const int column = grid.first_column + n * 8 + accumulator_column(lane_idx);
          const float (&d_s)[4] = r_ds[m][n];
          auto p = [&](int i) { return ptx::min_or_nan(r_p[m][n][2 * half + i], kMostP); };
          Mma::template store_pair<LayoutP>(s_p_addr, row, column, p(0), p(1), kLiftP);
          Mma::template store_pair<LayoutP>(s_ds_addr, row, column, d_s[2 * half],
                                            d_s[2 * half + 1], scale.up);
        }
      }
    }
  }

 private:
  __device__ static float of_tile(uint32_t s_addr) {
    if constexpr (kSplitFp32<Spec>) return ptx::ld_shared_f32(s_addr);
    return 1.f;
  }

  // Largest magnitude of a warp's values; if one is not finite, the largest finite magnitude.
  template <int kRowTiles, int kKeyTiles>
  __device__ static float most_of(const float (&r)[kRowTiles][kKeyTiles][4]) {
    auto most = [&](auto size) {
      float largest = 0.f;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) largest = fmaxf(largest, size(r[m][n][i]));
        }
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
      }
      return largest;
    };
    float largest = most([](float value) { return fabsf(value); });
    if (!(largest < infinity())) {
      largest = most([](float value) { return fabsf(value) < infinity() ? fabsf(value) : 0.f; });
    }
    return largest;
  }
};

}  // namespace jitattn

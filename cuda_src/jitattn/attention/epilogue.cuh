// Forward epilogue: merges the warps that split the keys, divides by the row sums, and writes the
// result, or the partial result of a split, to global memory.
#pragma once

#include "jitattn/attention/output_rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/score.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/attention/split_combine.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/accumulator.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/swizzle.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Required of Traits: the members that SplitCombine needs; Softmax; kRowTiles and kColumnTiles, the
// accumulator tiles of a warp; kDimV, its columns; Rows, its rows (tile/warp_rows.cuh); kWarpRows,
// the number of rows of a warp, and first_row(warp_q), the first of them; kIsTwoLevel, whether V
// has scales to multiply the output by; kStagesOutput, whether results may overwrite the shared
// tiles on their way to memory; kSumsAreDefined, whether the sums of a row that saw no key are 0;
// kAllWarpsWrite, whether no warps split the keys, as the compiler cannot see for itself.
template <class Spec, class Traits>
struct FwdEpilogue {
  using Threads = typename Traits::Threads;
  using Element = typename OutputRows<Spec>::Element;
  using Place = typename OutputRows<Spec>::Place;
  using Softmax = typename Traits::Softmax;
  using Output = float[Traits::kRowTiles][Traits::kColumnTiles][4];

  using Out = Scalar<Spec::kOutDtype>;
  static constexpr int kWarpFloats = Traits::kWarpRows * Traits::kDimV;
  static constexpr bool kIsWide = sizeof(Element) == 2 && Spec::kAccess == Access::kVec16;
  static constexpr bool kIsStaged = kIsWide && Traits::kStagesOutput;

  const FwdParamsOf<Spec>& params;
  const OutputRows<Spec> out;
  const uint32_t s_addr;
  const int lane_idx, warp_q, warp_kv;
  const typename Traits::Rows warp_rows;  // rows of the tile

  __device__ FwdEpilogue(const FwdParamsOf<Spec>& params, const CtaPlan& plan, uint32_t thread_idx,
                         uint32_t s_addr)
      : params(params),
        out(params, plan),
        s_addr(s_addr),
        lane_idx(thread_idx % 32),
        warp_q(thread_idx / 32 % Spec::kWarpsQ),
        warp_kv(thread_idx / 32 / Spec::kWarpsQ),
        warp_rows{Traits::first_row(warp_q), lane_idx} {}

  // Runs the epilogue in all threads of the CTA. The shared tiles are dead after the first barrier.
  __device__ void finish(Output& r_o, Softmax& softmax) const {
    softmax.reduce();
    if constexpr (Spec::kWarpsKv > 1) combine_warps(r_o, softmax);
    if (Traits::kAllWarpsWrite || warp_kv == 0) write(r_o, softmax);
    if (out.tile.num_splits > 1) {
      SplitCombine<Spec, Traits>{out, params, s_addr, lane_idx}.combine_if_last();
    }
  }

 private:
  __device__ void write(Output& r_o, const Softmax& softmax) const {
    float of_values = 1.f;  // apart from the row sum: the product of both could overflow fp32
    if constexpr (Traits::kIsTwoLevel) {
      const int64_t heads_kv = params.heads_q / params.heads_per_kv;
      of_values = __ldg(params.v_scale + out.tile.batch_idx * heads_kv +
                        out.tile.head_idx / params.heads_per_kv);
    }
    for_each_row([&](int m, int half, int row) {
      float sink = 0.f;  // 0 for partial results: the sink is added once
      if (Spec::kSinks == Switch::kOn && out.tile.num_splits == 1) {
        const Place place = out.place_of(row);
        if (place.exists) sink = sink_weight<Spec>(params, place.head, softmax.neg_max[m][half]);
      }
      float inverse = softmax.inverse_sum(m, half, sink);
      if constexpr (Spec::kDropout == Switch::kOn) inverse *= params.dropout_scale;
#pragma unroll
      for (int n = 0; n < Traits::kColumnTiles; ++n) {
        scale_row(r_o[m][n], half, inverse);
        if constexpr (!Traits::kSumsAreDefined) {
          const bool saw_none = softmax.row_sum[m][half] == 0.f;
          float (&tile)[4] = r_o[m][n];
          tile[2 * half] = saw_none ? 0.f : tile[2 * half];
          tile[2 * half + 1] = saw_none ? 0.f : tile[2 * half + 1];
        }
        if constexpr (Traits::kIsTwoLevel) scale_row(r_o[m][n], half, of_values);
      }
    });
    if (out.tile.num_splits > 1) {
      write_partial(r_o, softmax);
    } else {
      write_result(r_o, softmax);
    }
  }

  // Adds the partial results of warps 1 .. of the same rows to warp 0's, always in that order.
  __device__ void combine_warps(Output& r_o, Softmax& softmax) const {
    Threads::sync();  // every warp has finished with the K and V tiles
    if (warp_kv != 0) {
      const uint32_t slot = slot_addr(warp_kv);
      for_each_tile([&](int m, int n, int tile_idx) {
        Vec16 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) v.word[i] = __float_as_int(r_o[m][n][i]);
        ptx::st_shared_v4(slot + (tile_idx * 32 + lane_idx) * 16, v);
      });
      for_each_row([&](int m, int half, int) {
        if ((lane_idx & 3) != 0) return;
        const uint32_t s_stats = stats_addr(slot, m, half);
        ptx::st_shared_b32(s_stats, __float_as_int(softmax.neg_max[m][half]));
        ptx::st_shared_b32(s_stats + 4, __float_as_int(softmax.row_sum[m][half]));
      });
    }
    Threads::sync();  // the slots are written
    if (warp_kv == 0) {
#pragma unroll 1
      for (int other = 1; other < Spec::kWarpsKv; ++other) {
        add_slot(r_o, softmax, slot_addr(other));
      }
    }
    Threads::sync();  // the slots are read; staging may overwrite them
  }

  __device__ void add_slot(Output& r_o, Softmax& softmax, uint32_t slot) const {
    float keep[Traits::kRowTiles][2], add[Traits::kRowTiles][2];
    for_each_row([&](int m, int half, int) {
      const uint32_t s_stats = stats_addr(slot, m, half);
      const float neg_max = __int_as_float(ptx::ld_shared_b32(s_stats));
      const float sum = __int_as_float(ptx::ld_shared_b32(s_stats + 4));
      const float raised = fminf(softmax.neg_max[m][half], neg_max);
      keep[m][half] = ptx::exp2_approx(raised - softmax.neg_max[m][half]);
      add[m][half] = ptx::exp2_approx(raised - neg_max);
      softmax.row_sum[m][half] = softmax.row_sum[m][half] * keep[m][half] + sum * add[m][half];
      softmax.neg_max[m][half] = raised;
    });
    for_each_tile([&](int m, int n, int tile_idx) {
      const Vec16 v = ptx::ld_shared_v4(slot + (tile_idx * 32 + lane_idx) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r_o[m][n][i] = r_o[m][n][i] * keep[m][i / 2] + __int_as_float(v.word[i]) * add[m][i / 2];
      }
    });
  }

  __device__ void write_partial(const Output& r_o, const Softmax& softmax) const {
    for_each_row([&](int m, int half, int row_in_tile) {
      if (!out.place_of(row_in_tile).exists) return;
      const int64_t row = out.partial_row(out.tile.split_idx) + row_in_tile;
      if ((lane_idx & 3) == 0) params.partial_lse[row] = softmax.lse(m, half);
      write_row<Spec::kHeadDimV % 2 == 0>(params.partial_out + row * Spec::kHeadDimV, r_o[m], half);
    });
  }

  __device__ void write_result(const Output& r_o, const Softmax& softmax) const {
    if constexpr (kIsStaged && Spec::kWarpsKv == 1) {
      Threads::sync();  // every warp has finished with Q, K and V
    }
    for_each_row([&](int m, int half, int row) {
      const Place place = out.place_of(row);
      if (place.exists && params.lse != nullptr && (lane_idx & 3) == 0) {
        params.lse[out.lse_index(place)] = softmax.lse(m, half);
      }
      if constexpr (kIsStaged) {
        stage_row(r_o[m], half, row);
      } else if constexpr (kIsWide) {
        exchange_row(place, r_o[m], half);
      } else if (place.exists) {
        write_row<Spec::kAccess == Access::kVec16>(out.out_row(place), r_o[m], half);
      }
    });
    if constexpr (kIsStaged) {
      __syncwarp();  // a warp copies only rows that it staged itself
      copy_staged_rows();
    }
  }

  // ---- Staging of 16-bit results, for 16-byte stores of whole rows.
  using StageLayout = Swizzle<Traits::kDimV * 2 / 16>;

  __device__ void stage_row(const float (&tiles)[Traits::kColumnTiles][4], int half,
                            int row) const {
    const uint32_t s_row = s_addr + StageLayout::offset(row, 0) + (lane_idx & 3) * 4;
#pragma unroll
    for (int n = 0; n < Traits::kColumnTiles; ++n) {  // an n8 tile is one 16-byte chunk
      ptx::st_shared_b32(StageLayout::step(s_row, n),
                         Out::round_pair(tiles[n][2 * half], tiles[n][2 * half + 1]));
    }
  }

  __device__ void copy_staged_rows() const {
    constexpr int kChunks = Spec::kHeadDimV / 8;
    constexpr int kCount = Traits::kWarpRows * kChunks;
#pragma unroll 1
    for (int base = 0; base < kCount; base += 32) {
      const int item = base + lane_idx;
      const int row = warp_rows.nth(item / kChunks), chunk = item % kChunks;
      if (kCount % 32 != 0 && item >= kCount) continue;
      const Place place = out.place_of(row);
      if (!place.exists) continue;
      const Vec16 v = ptx::ld_shared_v4(s_addr + StageLayout::offset(row, chunk));
      *reinterpret_cast<Vec16*>(out.out_row(place) + chunk * 8) = v;
    }
  }

  // ---- 16-byte stores without staging: the four lanes of a row exchange four n8 tiles, after which
  // each has one of them.
  __device__ void exchange_row(const Place& place, const float (&tiles)[Traits::kColumnTiles][4],
                               int half) const {
    uint16_t* g_row = out.out_row(place);
#pragma unroll
    for (int first = 0; first < Traits::kColumnTiles; first += 4) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < min_of(4, Traits::kColumnTiles - first); ++i) {
        words[i] = Out::round_pair(tiles[first + i][2 * half], tiles[first + i][2 * half + 1]);
      }
      transpose_in_fours(words, lane_idx);
      const int column = (first + (lane_idx & 3)) * 8;
      if (place.exists && column < Spec::kHeadDimV) {
        *reinterpret_cast<Vec16*>(g_row + column) = {words[0], words[1], words[2], words[3]};
      }
    }
  }

  // ---- Direct stores from the fragments; kPaired: two columns may share one store.
  template <bool kPaired, class T>
  __device__ void write_row(T* g_row, const float (&tiles)[Traits::kColumnTiles][4],
                            int half) const {
#pragma unroll
    for (int n = 0; n < Traits::kColumnTiles; ++n) {
      const int column = n * 8 + accumulator_column(lane_idx);
      const float low = tiles[n][2 * half], high = tiles[n][2 * half + 1];
      const bool has_low = column < Spec::kHeadDimV, has_high = column + 1 < Spec::kHeadDimV;
      if constexpr (sizeof(T) == 4 && kPaired) {
        if (has_low) *reinterpret_cast<float2*>(g_row + column) = {low, high};
      } else if constexpr (sizeof(T) == 4) {
        if (has_low) g_row[column] = low;
        if (has_high) g_row[column + 1] = high;
      } else {
        const uint32_t packed = Out::round_pair(low, high);
        if (has_low) g_row[column] = static_cast<T>(packed);
        if (has_high) g_row[column + 1] = static_cast<T>(packed >> 16);
      }
    }
  }

  // ---- Slots of warps that split the keys.
  __device__ uint32_t slot_addr(int other_warp_kv) const {
    return s_addr + ((other_warp_kv - 1) * Spec::kWarpsQ + warp_q) *
                        (kWarpFloats + 2 * Traits::kWarpRows) * 4;
  }

  __device__ uint32_t stats_addr(uint32_t slot, int m, int half) const {
    return slot + (kWarpFloats + 2 * (m * 16 + accumulator_row(lane_idx, half))) * 4;
  }

  template <class F>
  __device__ void for_each_tile(F f) const {
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kColumnTiles; ++n) f(m, n, m * Traits::kColumnTiles + n);
    }
  }

  // Calls f(m, half, row of the tile) for the rows of this lane.
  template <class F>
  __device__ void for_each_row(F f) const {
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) f(m, half, warp_rows(m, half));
    }
  }
};

}  // namespace jitattn

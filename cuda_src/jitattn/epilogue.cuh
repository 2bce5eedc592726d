// From the accumulators of a CTA to global memory: merging the warps that split the keys, dividing
// by the row sums, and writing either the result or the partial result of a split.
#pragma once

#include "jitattn/enums.cuh"
#include "jitattn/params.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/rows.cuh"
#include "jitattn/schedule.cuh"
#include "jitattn/softmax.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/swizzle.cuh"
#include "jitattn/traits.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <class Spec>
struct FwdEpilogue {
  using Traits = FwdTraits<Spec>;
  using Element = typename Traits::ElementOut;
  using Softmax = OnlineSoftmax<Traits::kRowTiles>;
  using Output = float[Traits::kRowTiles][Traits::kColumnTiles][4];

  static constexpr int kWarpFloats = Traits::kWarpRows * Traits::kDimV;
  static constexpr bool kIsStaged = sizeof(Element) == 2 && Spec::kAccess == Access::kVec16;

  const FwdParams& params;
  const RowMap rows;
  const WorkTile tile;
  const uint32_t s_addr;
  const int lane_idx, warp_q, warp_kv;

  __device__ FwdEpilogue(const FwdParams& params, uint32_t cta_idx, uint32_t thread_idx,
                         uint32_t s_addr)
      : params(params),
        rows(params),
        tile(work_tile<Spec>(params, cta_idx)),
        s_addr(s_addr),
        lane_idx(thread_idx % 32),
        warp_q(thread_idx / 32 % Spec::kWarpsQ),
        warp_kv(thread_idx / 32 / Spec::kWarpsQ) {}

  // All threads of the CTA. The shared tiles are dead after the first barrier.
  __device__ void finish(Output& r_o, Softmax& softmax) const {
    softmax.reduce();
    if constexpr (Spec::kWarpsKv > 1) {
      merge_warps(r_o, softmax);
      if (warp_kv != 0) return;
    }
    for_each_row([&](int m, int half, int) {
      const float inverse = softmax.inverse_sum(m, half);
#pragma unroll
      for (int n = 0; n < Traits::kColumnTiles; ++n) {
        r_o[m][n][2 * half] *= inverse;
        r_o[m][n][2 * half + 1] *= inverse;
      }
    });
    if (params.num_splits > 1) {
      write_partial(r_o, softmax);
    } else {
      write_result(r_o, softmax);
    }
  }

 private:
  // Add the partial results of warps 1 .. of the same rows to warp 0's, always in that order.
  __device__ void merge_warps(Output& r_o, Softmax& softmax) const {
    ptx::barrier_sync<Traits::kNumThreads>();  // every warp is done with the K and V tiles
    if (warp_kv != 0) {
      const uint32_t slot = slot_addr(warp_kv);
      for_each_tile([&](int m, int n, int tile_idx) {
        Vec16 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) v.word[i] = __float_as_int(r_o[m][n][i]);
        ptx::st_shared_v4(slot + (tile_idx * 32 + lane_idx) * 16, v);
      });
      for_each_row([&](int m, int half, int row) {
        if ((lane_idx & 3) != 0) return;
        ptx::st_shared_b32(stats_addr(slot, row), __float_as_int(softmax.neg_max[m][half]));
        ptx::st_shared_b32(stats_addr(slot, row) + 4, __float_as_int(softmax.row_sum[m][half]));
      });
    }
    ptx::barrier_sync<Traits::kNumThreads>();  // the slots are written
    if (warp_kv == 0) {
#pragma unroll 1
      for (int other = 1; other < Spec::kWarpsKv; ++other) {
        add_slot(r_o, softmax, slot_addr(other));
      }
    }
    ptx::barrier_sync<Traits::kNumThreads>();  // the slots are read; staging may overwrite them
  }

  __device__ void add_slot(Output& r_o, Softmax& softmax, uint32_t slot) const {
    float keep[Traits::kRowTiles][2], add[Traits::kRowTiles][2];
    for_each_row([&](int m, int half, int row) {
      const float neg_max = __int_as_float(ptx::ld_shared_b32(stats_addr(slot, row)));
      const float sum = __int_as_float(ptx::ld_shared_b32(stats_addr(slot, row) + 4));
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
    const int64_t rows_of_split =
        static_cast<int64_t>(params.batch) * params.heads_q * params.len_q;
    for_each_row([&](int m, int half, int row_in_warp) {
      const Place place = place_of(row_in_warp);
      if (!place.exists) return;
      const int64_t row = tile.split_idx * rows_of_split + lse_index(place);
      if ((lane_idx & 3) == 0) params.partial_lse[row] = softmax.lse(m, half);
      write_row<Spec::kHeadDimV % 2 == 0>(params.partial_out + row * Spec::kHeadDimV, r_o[m], half);
    });
  }

  __device__ void write_result(const Output& r_o, const Softmax& softmax) const {
    if constexpr (kIsStaged && Spec::kWarpsKv == 1) {
      ptx::barrier_sync<Traits::kNumThreads>();  // every warp is done with Q, K and V
    }
    for_each_row([&](int m, int half, int row_in_warp) {
      const Place place = place_of(row_in_warp);
      if (place.exists && params.lse != nullptr && (lane_idx & 3) == 0) {
        params.lse[lse_index(place)] = softmax.lse(m, half);
      }
      if constexpr (kIsStaged) {
        stage_row(r_o[m], half, warp_q * Traits::kWarpRows + row_in_warp);
      } else if (place.exists) {
        write_row<Spec::kAccess == Access::kVec16>(out_row(place), r_o[m], half);
      }
    });
    if constexpr (kIsStaged) {
      __syncwarp();  // a warp copies only the rows that it staged
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
      ptx::st_shared_b32(
          StageLayout::step(s_row, n),
          MmaF32Acc<Spec::kOutDtype>::pack(tiles[n][2 * half], tiles[n][2 * half + 1]));
    }
  }

  __device__ void copy_staged_rows() const {
    constexpr int kChunks = Spec::kHeadDimV / 8;
    constexpr int kCount = Traits::kWarpRows * kChunks;
#pragma unroll 1
    for (int base = 0; base < kCount; base += 32) {
      const int item = base + lane_idx;
      const int row_in_warp = item / kChunks, chunk = item % kChunks;
      if (kCount % 32 != 0 && item >= kCount) continue;
      const Place place = place_of(row_in_warp);
      if (!place.exists) continue;
      const int row = warp_q * Traits::kWarpRows + row_in_warp;
      const Vec16 v = ptx::ld_shared_v4(s_addr + StageLayout::offset(row, chunk));
      *reinterpret_cast<Vec16*>(out_row(place) + chunk * 8) = v;
    }
  }

  // ---- Direct stores from the fragments; kPaired if two columns may go in one store.
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
        const uint32_t packed = MmaF32Acc<Spec::kOutDtype>::pack(low, high);
        if (has_low) g_row[column] = static_cast<T>(packed);
        if (has_high) g_row[column + 1] = static_cast<T>(packed >> 16);
      }
    }
  }

  // ---- Where a row of this warp goes.
  struct Place {
    int position;
    int head;
    bool exists;
  };

  __device__ Place place_of(int row_in_warp) const {
    const int row = tile.q_tile_idx * Spec::kBlockQ + warp_q * Traits::kWarpRows + row_in_warp;
    const int position = rows.position(row);
    return {position, tile.head_idx + rows.head(row, position), row < rows.num_rows};
  }

  __device__ int64_t lse_index(const Place& place) const {
    return (static_cast<int64_t>(tile.batch_idx) * params.heads_q + place.head) * params.len_q +
           place.position;
  }

  __device__ Element* out_row(const Place& place) const {
    return static_cast<Element*>(params.out) + tile.batch_idx * params.out_stride_batch +
           place.position * params.out_stride_row + place.head * params.out_stride_head;
  }

  __device__ uint32_t slot_addr(int other_warp_kv) const {
    return s_addr + ((other_warp_kv - 1) * Spec::kWarpsQ + warp_q) *
                        (kWarpFloats + 2 * Traits::kWarpRows) * 4;
  }

  __device__ static uint32_t stats_addr(uint32_t slot, int row_in_warp) {
    return slot + (kWarpFloats + 2 * row_in_warp) * 4;
  }

  template <class F>
  __device__ void for_each_tile(F f) const {
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kColumnTiles; ++n) f(m, n, m * Traits::kColumnTiles + n);
    }
  }

  // f(m, half, row within the warp)
  template <class F>
  __device__ void for_each_row(F f) const {
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) f(m, half, m * 16 + accumulator_row(lane_idx, half));
    }
  }
};

}  // namespace jitattn

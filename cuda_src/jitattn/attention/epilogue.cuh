// From the accumulators of a CTA to global memory: merging the warps that split the keys, dividing
// by the row sums, and writing either the result or the partial result of a split. The CTA that
// finishes the last split of a tile adds the splits up, always in their order.
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/score.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/attention/softmax.cuh"
#include "jitattn/fwd/sm80/traits.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/accumulator.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/swizzle.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct FwdEpilogue {
  using Traits = FwdTraits<Spec>;
  using Element = typename Traits::ElementOut;
  using Softmax = OnlineSoftmax<Traits::kRowTiles, Traits::Mma::kMaxSlack, Traits::Mma::kLift>;
  using Output = float[Traits::kRowTiles][Traits::kColumnTiles][4];

  static constexpr int kWarpFloats = Traits::kWarpRows * Traits::kDimV;
  static constexpr bool kIsStaged = sizeof(Element) == 2 && Spec::kAccess == Access::kVec16;

  const FwdParamsOf<Spec>& params;
  const WorkTile tile;
  const Sequence sequence;
  const RowMap rows;
  const uint32_t s_addr;
  const int lane_idx, warp_q, warp_kv;

  __device__ FwdEpilogue(const FwdParamsOf<Spec>& params, const CtaPlan& plan, uint32_t thread_idx,
                         uint32_t s_addr)
      : params(params),
        tile(plan.tile),
        sequence(plan.sequence),
        rows(params, plan.sequence.len_q),
        s_addr(s_addr),
        lane_idx(thread_idx % 32),
        warp_q(thread_idx / 32 % Spec::kWarpsQ),
        warp_kv(thread_idx / 32 / Spec::kWarpsQ) {}

  // All threads of the CTA. The shared tiles are dead after the first barrier.
  __device__ void finish(Output& r_o, Softmax& softmax) const {
    softmax.reduce();
    if constexpr (Spec::kWarpsKv > 1) merge_warps(r_o, softmax);
    if (warp_kv == 0) write(r_o, softmax);
    if (tile.num_splits > 1) merge_splits_if_last();
  }

 private:
  struct Place {
    int position;  // in the tensor: that of the sequence's first row included
    int head;
    bool exists;
  };

  __device__ void write(Output& r_o, const Softmax& softmax) const {
    float of_values = 1.f;  // apart from the sums: a product of both might not be a number of fp32
    if constexpr (Traits::kParksSums) {
      const int64_t heads_kv = params.heads_q / params.heads_per_kv;
      of_values =
          __ldg(params.v_scale + tile.batch_idx * heads_kv + tile.head_idx / params.heads_per_kv);
    }
    for_each_row([&](int m, int half, int row_in_warp) {
      float sink = 0.f;  // not of partial results: a sink is added once
      if (Spec::kSinks == Switch::kOn && tile.num_splits == 1) {
        const Place place = place_of(row_in_warp);
        if (place.exists) sink = sink_weight<Spec>(params, place.head, softmax.neg_max[m][half]);
      }
      float inverse = softmax.inverse_sum(m, half, sink);
      if constexpr (Spec::kDropout == Switch::kOn) inverse *= params.dropout_scale;
#pragma unroll
      for (int n = 0; n < Traits::kColumnTiles; ++n) {
        scale_row(r_o[m][n], half, inverse);
        if constexpr (Traits::kParksSums) scale_row(r_o[m][n], half, of_values);
      }
    });
    if (tile.num_splits > 1) {
      write_partial(r_o, softmax);
    } else {
      write_result(r_o, softmax);
    }
  }

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
    for_each_row([&](int m, int half, int row_in_warp) {
      if (!place_of(row_in_warp).exists) return;
      const int64_t row = partial_row(tile.split_idx) + warp_q * Traits::kWarpRows + row_in_warp;
      if ((lane_idx & 3) == 0) params.partial_lse[row] = softmax.lse(m, half);
      write_row<Spec::kHeadDimV % 2 == 0>(params.partial_out + row * Spec::kHeadDimV, r_o[m], half);
    });
  }

  // First row of a split's partial result.
  __device__ int64_t partial_row(int split_idx) const {
    const int head_tiles = params.heads_q / params.heads_per_tile;
    return (static_cast<int64_t>(tile.item + split_idx) * head_tiles + head_tile_idx()) *
           Spec::kBlockQ;
  }

  __device__ int head_tile_idx() const { return tile.head_idx / params.heads_per_tile; }

  // All threads. Every CTA reports that its split is written; the one that finds all the others
  // reported merges them, and sets the counter back for the next launch.
  __device__ void merge_splits_if_last() const {
    const int head_tiles = params.heads_q / params.heads_per_tile;
    int32_t* g_arrivals =
        params.arrivals + static_cast<int64_t>(tile.item) * head_tiles + head_tile_idx();
    const uint32_t s_flag = s_addr + Traits::kOffsetPlan + Traits::kBytesPlan - 4;
    __threadfence();  // what this thread wrote, before the report
    ptx::barrier_sync<Traits::kNumThreads>();
    if (threadIdx.x == 0) {
      const bool is_last = atomicAdd(g_arrivals, 1) == tile.num_splits - 1;
      if (is_last) *g_arrivals = 0;
      ptx::st_shared_b32(s_flag, is_last);
    }
    ptx::barrier_sync<Traits::kNumThreads>();
    if (ptx::ld_shared_b32(s_flag) == 0) return;
    __threadfence();  // the other CTAs' results, after their reports
    merge_splits();
  }

  // All threads: out = sum_s w_s out_s / sum_s w_s with w_s = exp(LSE_s - max LSE), the splits in
  // their order. A warp per row finds maximum and sum of the weights; then a thread per
  // kMergeColumns columns of a row adds the values up, many loads in flight.
  static constexpr bool kIsShort = Spec::kBlockQ <= 64;  // else, more would spill in the main loop
  static constexpr int kMergeItems = kIsShort ? 2 : 1, kMergeSplits = kIsShort ? 8 : 4;
  static constexpr int kMergeColumns = Spec::kHeadDimV % 4 == 0 ? 4 : 1;
  static_assert(Spec::kBlockQ * 8 <= Traits::kBytesReused, "maxima and sums fit");

  __device__ void merge_splits() const {
    constexpr int kChunks = Spec::kHeadDimV / kMergeColumns;  // of a row
    const int64_t step = partial_row(1) - partial_row(0);     // rows from a split to the next
    const int num_rows = min_of(Spec::kBlockQ, rows.num_rows - tile.q_tile_idx * Spec::kBlockQ);
    const float* g_lses = params.partial_lse + partial_row(0);
#pragma unroll 2
    for (int row = threadIdx.x / 32; row < num_rows; row += Traits::kNumWarps) {
      find_weights(row, g_lses + row, step);
    }
    ptx::barrier_sync<Traits::kNumThreads>();  // maxima and sums are written

#pragma unroll 1
    for (int first = 0; first < num_rows * kChunks; first += Traits::kNumThreads * kMergeItems) {
      // Items beyond the last one read it again: a branch would keep loads from flying together.
      int row[kMergeItems], chunk[kMergeItems];
      float highest[kMergeItems], sum[kMergeItems][kMergeColumns] = {};
#pragma unroll
      for (int j = 0; j < kMergeItems; ++j) {
        const int item = min_of(first + j * Traits::kNumThreads + static_cast<int>(threadIdx.x),
                                num_rows * kChunks - 1);
        row[j] = item / kChunks;
        chunk[j] = item % kChunks;
        highest[j] = __int_as_float(ptx::ld_shared_b32(s_addr + row[j] * 8));
      }
#pragma unroll kMergeSplits
      for (int split = 0; split < tile.num_splits; ++split) {
        const float* g_rows = params.partial_out + partial_row(split) * Spec::kHeadDimV;
#pragma unroll
        for (int j = 0; j < kMergeItems; ++j) {
          const float w = weight(__ldcg(g_lses + split * step + row[j]), highest[j]);
          const float* g_values = g_rows + row[j] * Spec::kHeadDimV + chunk[j] * kMergeColumns;
          if constexpr (kMergeColumns == 4) {
            const float4 v = __ldcg(reinterpret_cast<const float4*>(g_values));
            sum[j][0] += w * v.x;
            sum[j][1] += w * v.y;
            sum[j][2] += w * v.z;
            sum[j][3] += w * v.w;
          } else {
            sum[j][0] += w * __ldcg(g_values);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kMergeItems; ++j) {
        if (first + j * Traits::kNumThreads + threadIdx.x >= num_rows * kChunks) continue;
        if (kHasLists<Spec> && !place_of_row(row[j]).exists) continue;
        const float inverse = __int_as_float(ptx::ld_shared_b32(s_addr + row[j] * 8 + 4));
#pragma unroll
        for (int i = 0; i < kMergeColumns; ++i) sum[j][i] *= inverse;
        store_merged(out_row(place_of_row(row[j])) + chunk[j] * kMergeColumns, sum[j]);
      }
    }
  }

  // One warp, one row: leaves the largest LSE and 1 / sum of the weights in shared memory, and
  // writes the LSE.
  __device__ void find_weights(int row, const float* g_lse, int64_t step) const {
    float highest = -infinity();
    for (int split = lane_idx; split < tile.num_splits; split += 32) {
      highest = fmaxf(highest, __ldcg(g_lse + split * step));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, mask));
    }
    float total = 0.f;
    for (int split = lane_idx; split < tile.num_splits; split += 32) {
      total += weight(__ldcg(g_lse + split * step), highest);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(0xffffffffu, total, mask);
    if (lane_idx != 0) return;
    ptx::st_shared_b32(s_addr + row * 8, __float_as_int(highest));
    constexpr float kLog2e = 1.4426950408889634f;
    const float sink = sink_weight<Spec>(params, place_of_row(row).head, -highest * kLog2e);
    const float inverse = total == 0.f ? 0.f : 1.f / (total + sink);
    ptx::st_shared_b32(s_addr + row * 8 + 4, __float_as_int(inverse));
    if (params.lse != nullptr && (!kHasLists<Spec> || place_of_row(row).exists)) {
      params.lse[lse_index(place_of_row(row))] =
          total == 0.f ? -infinity() : highest + ptx::log2_approx(total) * kLn2;
    }
  }

  // exp(lse - highest); a split that saw nothing has weight 0.
  __device__ static float weight(float lse, float highest) {
    constexpr float kLog2e = 1.4426950408889634f;
    return lse == -infinity() ? 0.f : ptx::exp2_approx((lse - highest) * kLog2e);
  }

  __device__ static void store_merged(Element* g_out, const float (&values)[kMergeColumns]) {
#pragma unroll
    for (int i = 0; i < kMergeColumns; ++i) g_out[i] = Scalar<Spec::kOutDtype>::round(values[i]);
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

  // ---- Where a row goes.
  __device__ Place place_of(int row_in_warp) const {
    return place_of_row(warp_q * Traits::kWarpRows + row_in_warp);
  }

  __device__ Place place_of_row(int row_in_tile) const {
    const int row = tile.q_tile_idx * Spec::kBlockQ + row_in_tile;
    const int position = rows.position(row);
    return {sequence.q_start + position, tile.head_idx + rows.head(row, position),
            row < rows.num_rows && (!kHasLists<Spec> || position >= sequence.first_position)};
  }

  __device__ int64_t lse_index(const Place& place) const {
    return tile.batch_idx * params.lse_stride_batch + place.head * params.lse_stride_head +
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

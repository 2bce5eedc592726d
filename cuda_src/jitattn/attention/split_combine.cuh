// Split-KV combine: the CTA that finishes the last split of a tile merges all splits, in order.
#pragma once

#include "jitattn/attention/output_rows.cuh"
#include "jitattn/attention/score.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Required of Traits: Threads, the threads that merge (tile/threads.cuh); kBytesReused, the bytes
// of shared memory at s_addr that are free by then; kOffsetFlag, the offset of four more.
template <class Spec, class Traits>
struct SplitCombine {
  using Threads = typename Traits::Threads;
  using Element = typename OutputRows<Spec>::Element;

  const OutputRows<Spec>& out;
  const FwdParamsOf<Spec>& params;
  const uint32_t s_addr;
  const int lane_idx;

  // Merges the splits if this CTA arrives last. Called by all threads. Each CTA counts its arrival;
  // the one that finds all others arrived merges, and resets the counter for the next launch.
  __device__ void combine_if_last() const {
    const int head_tiles = params.heads_q / params.heads_per_tile;
    int32_t* g_arrivals =
        params.arrivals + static_cast<int64_t>(out.tile.item) * head_tiles + out.head_tile_idx();
    const uint32_t s_flag = s_addr + Traits::kOffsetFlag;
    __threadfence();  // this thread's writes precede the arrival
    Threads::sync();
    if (Threads::idx() == 0) {
      const bool is_last = atomicAdd(g_arrivals, 1) == out.tile.num_splits - 1;
      if (is_last) *g_arrivals = 0;
      ptx::st_shared_b32(s_flag, is_last);
    }
    Threads::sync();
    if (ptx::ld_shared_b32(s_flag) == 0) return;
    __threadfence();  // the arrivals precede reads of the other CTAs' results
    merge();
  }

 private:
  // out = sum_s w_s out_s / sum_s w_s with w_s = exp(LSE_s - max LSE), the splits in order. Called
  // by all threads. A warp per row finds the maximum and the sum of the weights; then a thread per
  // kCombineColumns columns of a row adds the values up. Short tiles, which are the ones usually
  // split, keep many loads in flight. For tall tiles unrolled loops would double the kernel, its
  // compile time and its spills for no gain.
  static constexpr bool kIsShort = Spec::kBlockQ <= 64;
  static constexpr int kCombineItems = kIsShort ? 2 : 1, kCombineSplits = kIsShort ? 8 : 1;
  static constexpr int kLaneRounds = kIsShort ? 4 : 1;
  static constexpr int kCombineColumns = Spec::kHeadDimV % 4 == 0 ? 4 : 1;
  static_assert(Spec::kBlockQ * 8 <= Traits::kBytesReused, "maxima and sums fit");

  __device__ void merge() const {
    constexpr int kChunks = Spec::kHeadDimV / kCombineColumns;     // per row
    const int64_t step = out.partial_row(1) - out.partial_row(0);  // rows between splits
    const int num_rows = out.num_rows();
    const float* g_lses = params.partial_lse + out.partial_row(0);
#pragma unroll kCombineItems
    for (int row = Threads::idx() / 32; row < num_rows; row += Threads::kNumWarps) {
      find_weights(row, g_lses + row, step);
    }
    Threads::sync();  // maxima and sums are written

#pragma unroll 1
    for (int first = 0; first < num_rows * kChunks; first += Threads::kNumThreads * kCombineItems) {
      // Items beyond the last one read it again: a branch would serialise the loads.
      int row[kCombineItems], chunk[kCombineItems];
      float highest[kCombineItems], sum[kCombineItems][kCombineColumns] = {};
#pragma unroll
      for (int j = 0; j < kCombineItems; ++j) {
        const int item = min_of(first + j * Threads::kNumThreads + static_cast<int>(Threads::idx()),
                                num_rows * kChunks - 1);
        row[j] = item / kChunks;
        chunk[j] = item % kChunks;
        highest[j] = __int_as_float(ptx::ld_shared_b32(s_addr + row[j] * 8));
      }
#pragma unroll kCombineSplits
      for (int split = 0; split < out.tile.num_splits; ++split) {
        const float* g_rows = params.partial_out + out.partial_row(split) * Spec::kHeadDimV;
#pragma unroll
        for (int j = 0; j < kCombineItems; ++j) {
          const float w = weight(__ldcg(g_lses + split * step + row[j]), highest[j]);
          const float* g_values = g_rows + row[j] * Spec::kHeadDimV + chunk[j] * kCombineColumns;
          if constexpr (kCombineColumns == 4) {
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
      for (int j = 0; j < kCombineItems; ++j) {
        if (first + j * Threads::kNumThreads + Threads::idx() >= num_rows * kChunks) continue;
        if (kHasBlockLists<Spec> && !out.place_of(row[j]).exists) continue;
        const float inverse = __int_as_float(ptx::ld_shared_b32(s_addr + row[j] * 8 + 4));
#pragma unroll
        for (int i = 0; i < kCombineColumns; ++i) sum[j][i] *= inverse;
        store_combined(out.out_row(out.place_of(row[j])) + chunk[j] * kCombineColumns, sum[j]);
      }
    }
  }

  // Finds the largest LSE and 1 / sum of the weights of one row with one warp, leaves both in
  // shared memory, and writes the LSE.
  __device__ void find_weights(int row, const float* g_lse, int64_t step) const {
    float highest = -infinity();
#pragma unroll kLaneRounds
    for (int split = lane_idx; split < out.tile.num_splits; split += 32) {
      highest = fmaxf(highest, __ldcg(g_lse + split * step));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, mask));
    }
    float total = 0.f;
#pragma unroll kLaneRounds
    for (int split = lane_idx; split < out.tile.num_splits; split += 32) {
      total += weight(__ldcg(g_lse + split * step), highest);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(0xffffffffu, total, mask);
    if (lane_idx != 0) return;
    ptx::st_shared_b32(s_addr + row * 8, __float_as_int(highest));
    constexpr float kLog2e = 1.4426950408889634f;
    const float sink = sink_weight<Spec>(params, out.place_of(row).head, -highest * kLog2e);
    const float inverse = total == 0.f ? 0.f : 1.f / (total + sink);
    ptx::st_shared_b32(s_addr + row * 8 + 4, __float_as_int(inverse));
    if (params.lse != nullptr && (!kHasBlockLists<Spec> || out.place_of(row).exists)) {
      params.lse[out.lse_index(out.place_of(row))] =
          total == 0.f ? -infinity() : highest + ptx::log2_approx(total) * kLn2;
    }
  }

  // exp(lse - highest); a split that saw no key has weight 0.
  __device__ static float weight(float lse, float highest) {
    constexpr float kLog2e = 1.4426950408889634f;
    return lse == -infinity() ? 0.f : ptx::exp2_approx((lse - highest) * kLog2e);
  }

  __device__ static void store_combined(Element* g_out, const float (&values)[kCombineColumns]) {
#pragma unroll
    for (int i = 0; i < kCombineColumns; ++i) g_out[i] = Scalar<Spec::kOutDtype>::round(values[i]);
  }
};

}  // namespace jitattn

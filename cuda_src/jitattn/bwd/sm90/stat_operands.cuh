// LSE and delta of a step's rows, which warpgroup 0 loads and the others read: as numbers, or as the
// operand of one more step of the products that give S and dP.
//
// The operand has a row [16] of bf16 for each query,
//   -LSE / scale in three parts, -delta in three parts, zeros,
// and is multiplied by rows of ones at the parts that are wanted. Three parts have the 24 bits of
// fp32. (Cheaper where a step has many rows: no loads, additions or registers in the main loop.)
#pragma once

#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm90/pipeline.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/bwd/sm90/work.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/sm90/elected.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// The matrices of ones.
enum StatOperand : int { kLseOperand, kDeltaOperand };

// Returns the descriptor of a matrix [rows, 16] without swizzle: 8x8 matrices of 128 bytes, the two
// of eight rows one after the other. PTX ISA, "wgmma matrix descriptor".
__device__ __forceinline__ uint64_t stat_descriptor(uint32_t s_addr) {
  return static_cast<uint64_t>(256 >> 4) << 32 | 128 >> 4 << 16 | (s_addr & 0x3ffff) >> 4;
}
__device__ __forceinline__ uint32_t stat_row_offset(int row) {
  return row / 8 * 256 + row % 8 * 16;
}

// Splits a number into three bf16 parts.
__device__ __forceinline__ void split_in_three(uint16_t (&parts)[3], float number) {
  using Part = Scalar<Dtype::kBf16>;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    parts[i] = Part::round(number);
    number -= Part::load(parts[i]);
  }
}

// Each thread of the warpgroup has one row, and holds its numbers from when they are loaded until
// their stage is free: statistics are loaded a step before Q and dO.
template <class Spec>
struct RowStatistics {
  using Traits = BwdSm90Traits<Spec>;
  using Work = BwdSm90Work<Spec>;
  static_assert(Spec::kBlockQ <= 128, "a thread has one row");

  float lse = 0.f;
  float delta = 0.f;
  int64_t at = 0;  // of the row of the next step to be loaded

  // Writes the matrices of ones, and the zeros of the others, before a barrier of all threads.
  __device__ static void init(uint32_t s_addr) {
    if constexpr (Traits::kStatsByMma) {
      constexpr uint32_t kOne = 0x3f80, kOnes = kOne << 16 | kOne;
      for (int row = threadIdx.x; row < 64; row += Traits::kNumThreads) {
        const uint32_t s_row = s_addr + Traits::kOffsetOnes + stat_row_offset(row);
        ptx::st_shared_v4(s_row, {{kOnes, kOne, 0, 0}});
        ptx::st_shared_v4(s_row + Traits::kBytesOnes, {{0, kOne << 16, kOnes, 0}});
        ptx::st_shared_v4(s_row + 128, Vec16{});
        ptx::st_shared_v4(s_row + Traits::kBytesOnes + 128, Vec16{});
      }
      for (int row = threadIdx.x; row < Traits::kStages * Spec::kBlockQ;
           row += Traits::kNumThreads) {
        ptx::st_shared_v4(s_addr + Traits::kOffsetStats + stat_row_offset(row) + 128, Vec16{});
      }
      ptx::fence_proxy_async();
    }
  }

  // Finds this thread's row of a step in the statistics.
  __device__ __forceinline__ void seek(const Work& work, const QueryStep& step) {
    const auto& params = work.params;
    at = work.own.batch * params.stat_stride_batch +
         (work.first_head() + step.head) * params.stat_stride_head + work.sequence.q_start +
         step.tile * Spec::kBlockQ + static_cast<int>(threadIdx.x);
  }

  // Loads the numbers of a step, and goes on to the next. A row that does not exist has weights of 0.
  __device__ __forceinline__ void load(const Work& work, QueryStep& step) {
    const int row = step.tile * Spec::kBlockQ + static_cast<int>(threadIdx.x);
    const bool exists = threadIdx.x < Spec::kBlockQ && row < work.sequence.len_q;
    lse = exists ? __ldg(work.params.lse_log2 + at) : infinity();  // nothing waits for it here
    delta = exists ? __ldg(work.params.delta + at) : 0.f;
    at += Spec::kBlockQ;
    if (work.advance(step)) seek(work, step);
  }

  // Called by all threads of the warpgroup, once for each phase of the stage.
  __device__ __forceinline__ void store(const Work& work, uint32_t s_addr,
                                        const BwdBarriers<Spec>& barriers, int stage) const {
    const uint32_t s_stats = s_addr + Traits::kOffsetStats + stage * Traits::kBytesStats;
    if (threadIdx.x < Spec::kBlockQ) {
      if constexpr (Traits::kStatsByMma) {
        store_parts(s_stats + stat_row_offset(threadIdx.x), 1.f / work.params.scale_log2);
      } else {
        const uint32_t s_row = s_stats + threadIdx.x * 4;
        ptx::st_shared_b32(s_row, __float_as_uint(-lse));
        ptx::st_shared_b32(s_row + Traits::kBytesStat, __float_as_uint(delta));
      }
    }
    if constexpr (Traits::kStatsByMma) ptx::fence_proxy_async();
    __syncwarp();
    ptx::mbarrier_arrive_elected(barriers.q_full(stage));
  }

 private:
  __device__ __forceinline__ void store_parts(uint32_t s_row, float inverse_scale) const {
    constexpr float kMost = 3.3e38f;  // of bf16, nearly; infinity times 0 is not a number
    uint16_t parts[3], d[3];
    split_in_three(parts, max_of(-kMost, min_of(kMost, -lse * inverse_scale)));
    split_in_three(d, -delta);
    auto pair = [](uint32_t low, uint32_t high) { return high << 16 | low; };
    ptx::st_shared_v4(s_row,
                      {{pair(parts[0], parts[1]), pair(parts[2], d[0]), pair(d[1], d[2]), 0}});
  }
};

}  // namespace jitattn

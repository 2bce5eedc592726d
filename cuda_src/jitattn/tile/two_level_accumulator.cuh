// Two-level accumulation of the output in fp16, for any number of keys.
//
// An fp16 accumulator rounds at every step of 16 keys, and ignores addends below 2^-11 of it.
// So the lower level sums at most kKeys keys; each such sum is then added to an upper level, also
// fp16, in shared memory. Both stay in range: the lower level by the scales of weights and values
// (mma/int8.cuh), the upper level by a factor of 2^-shift.
#pragma once

#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/accumulator.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// Per-thread sums, not shared between threads. Block ordinals descend from `end`; the lower level
// is flushed after ordinals that are a multiple of kBlocks, except after the last one, `begin`.
template <int kRowTiles, int kColumnTiles, int kBlockKv, int kNumThreads>
struct TwoLevelAccumulator {
  static constexpr int kKeys = 2048;
  static constexpr int kBlocks = kKeys / kBlockKv;
  static_assert(kBlocks * kBlockKv == kKeys && (kBlocks & (kBlocks - 1)) == 0);
  static_assert(kColumnTiles % 2 == 0);

  // Sums, two tiles in 16 bytes; then their maxima, [row tile][half].
  static constexpr int kUnits = kRowTiles * kColumnTiles / 2;
  static constexpr int kBytes = kNumThreads * (kUnits * 16 + kRowTiles * 8);

  using Sums = NarrowTile[kRowTiles][kColumnTiles];
  using Maxima = float[kRowTiles][2];

  uint32_t s_sums_addr, s_maxima_addr;  // of this thread
  int begin, end;

  __device__ TwoLevelAccumulator(uint32_t s_addr, int thread_idx, int begin, int end)
      : s_sums_addr(s_addr + thread_idx * 16),
        s_maxima_addr(s_addr + kNumThreads * kUnits * 16 + thread_idx * 4),
        begin(begin),
        end(end) {}

  // Flushes the lower level if block `ordinal` ends a group; r_o is then zero.
  __device__ void flush_if_due(Sums& r_o, const Maxima& neg_max, int ordinal) const {
    if ((ordinal & (kBlocks - 1)) == 0 && ordinal > begin) flush(r_o, neg_max, ordinal);
  }

  // Returns r_sum = r_o plus the upper level, after the last block.
  __device__ void collect(WideTile (&r_sum)[kRowTiles][kColumnTiles], const Sums& r_o,
                          const Maxima& neg_max) const {
    const bool has_upper = (end - 1) / kBlocks * kBlocks > begin;
    const float up = __int_as_float((127 + shift()) << 23);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          r_sum[m][n][2 * half] = low_of(r_o[m][n][half]);
          r_sum[m][n][2 * half + 1] = high_of(r_o[m][n][half]);
        }
      }
      if (!has_upper) continue;
      const float factors[2] = {up * factor_of(neg_max, m, 0), up * factor_of(neg_max, m, 1)};
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        const Vec16 upper = ptx::ld_shared_v4(unit_addr(m, n));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          WideTile& sum = r_sum[m][n + i / 2];
          const int half = i % 2;
          sum[2 * half] = fmaf(low_of(upper.word[i]), factors[half], sum[2 * half]);
          sum[2 * half + 1] = fmaf(high_of(upper.word[i]), factors[half], sum[2 * half + 1]);
        }
      }
    }
  }

 private:
  __device__ void flush(Sums& r_o, const Maxima& neg_max, int ordinal) const {
    const bool is_first = ordinal + kBlocks >= end;
    const float down = __int_as_float((127 - shift()) << 23);
    const uint32_t downs = ptx::pack_f16x2(down, down);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      uint32_t factors[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = is_first ? 0.f : factor_of(neg_max, m, half);
        factors[half] = ptx::pack_f16x2(factor, factor);
        ptx::st_shared_b32(maximum_addr(m, half), __float_as_uint(neg_max[m][half]));
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        Vec16 upper = {};
        if (!is_first) upper = ptx::ld_shared_v4(unit_addr(m, n));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t& sum = r_o[m][n + i / 2][i % 2];
          const uint32_t before = ptx::mul_f16x2(upper.word[i], factors[i % 2]);
          upper.word[i] = ptx::fma_f16x2(sum, downs, before);
          sum = 0;
        }
        ptx::st_shared_v4(unit_addr(m, n), upper);
      }
    }
  }

  // log2 of the number of flushed sums, rounded up; at most 14.
  __device__ int shift() const { return min_of(14, 32 - __clz((end - begin) / kBlocks)); }

  __device__ uint32_t unit_addr(int m, int n) const {
    return s_sums_addr + (m * kColumnTiles + n) / 2 * kNumThreads * 16;
  }

  __device__ uint32_t maximum_addr(int m, int half) const {
    return s_maxima_addr + (m * 2 + half) * kNumThreads * 4;
  }

  // Factor of the upper level for the current maxima: a power of two.
  __device__ float factor_of(const Maxima& neg_max, int m, int half) const {
    return ptx::exp2_approx(neg_max[m][half] - ptx::ld_shared_f32(maximum_addr(m, half)));
  }
};

struct OneLevelAccumulator {
  static constexpr int kBytes = 0;
  __device__ OneLevelAccumulator(uint32_t, int, int, int) {}
  template <class Sums, class Maxima>
  __device__ void flush_if_due(const Sums&, const Maxima&, int) const {}
};

}  // namespace jitattn

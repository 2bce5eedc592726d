// Numerics classes tf32x3 and tf32: fp32 operands, split into two TF32 parts or rounded to one,
// mma.m16n8k8.
//
// x = high + low with high = tf32(x), low = tf32(x - high) keeps 22 bits of the mantissa. A product
// is high*high + high*low + low*high in fp32; low*low is below 2^-22 of it and omitted.
//
// NOTE: the tensor cores truncate when they add to an fp32 accumulator, so long sums drift by up to
// 2^-23 a step. Sums therefore start from zero every kPromoteSteps steps and are added to the
// result by ordinary fp32 additions, which round. (notes/0002)
#pragma once

#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/mma_sm80.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <int kProducts>  // 3 or 1
struct MmaTf32 {
  using Element = float;
  static constexpr int kMaxSlack = 8;  // slack of the running maximum: OnlineSoftmax
  static constexpr int kLift = 0;
  static constexpr int kPromoteSteps = 4;  // MMA steps (of depth 8) between promotions

  // Lane addresses in a V tile [keys][columns]: rows 2t and 2t + 1, column g (see add_output).
  template <int kChunks>
  struct LaneV {
    uint32_t addr[2];
    __device__ LaneV(uint32_t s_v_addr, int lane_idx) {
      const int row = (lane_idx & 3) * 2, column = lane_idx >> 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        addr[i] = s_v_addr + Swizzle<kChunks>::offset(row + i, column >> 2) + (column & 3) * 4;
      }
    }
    __device__ void advance(int bytes) {
      addr[0] += bytes;
      addr[1] += bytes;
    }
  };

  // r_s += Q K^T over kDim columns; lane addresses as fragment.cuh gives them for Q and K.
  // ldmatrix moves 16-byte rows, so with fp32 an 8x8 block is 8 rows of 4 values, lane (g, t)
  // getting row g, column t: the A and B fragments of m16n8k8.
  template <int kDim, int kRowTiles, int kKeyTiles>
  __device__ static void add_scores(float (&r_s)[kRowTiles][kKeyTiles][4], uint32_t q_addr,
                                    uint32_t k_addr) {
    using Layout = Swizzle<kDim / 4>;
    constexpr int kSteps = kDim / 8;
#pragma unroll
    for (int first = 0; first < kSteps; first += kPromoteSteps) {
      constexpr int kCount = min_of(kPromoteSteps, kSteps);
      Split<4> q[kCount][kRowTiles];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (first + i >= kSteps) continue;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          uint32_t r[4];
          ptx::ldmatrix_x4(r, Layout::step(q_addr, 2 * (first + i)) + m * 16 * Layout::kRowBytes);
          q[i][m].set(r);
        }
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        float sum[kRowTiles][2][4] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (first + i >= kSteps) continue;
          uint32_t r[4];
          ptx::ldmatrix_x4(r, Layout::step(k_addr, 2 * (first + i)) + n * 8 * Layout::kRowBytes);
          const uint32_t left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
          Split<2> k[2];
          k[0].set(left);
          k[1].set(right);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            mma(sum[m][0], q[i][m], k[0]);
            mma(sum[m][1], q[i][m], k[1]);
          }
        }
        promote(r_s, sum, n);
      }
    }
  }

  // r_o += P V with P = exponentiate(r_s). The order of the keys within a step of 8 is free as long
  // as A and B agree: contraction index t stands for key 2t, index t + 4 for key 2t + 1, so that a
  // lane's accumulators are its A fragment without a shuffle.
  template <int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks, class Exponentiate>
  __device__ static void add_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                    float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const LaneV<kChunks>& lane, Exponentiate exponentiate) {
    using Layout = Swizzle<kChunks>;
#pragma unroll
    for (int first = 0; first < kKeyTiles; first += kPromoteSteps) {
      constexpr int kCount = min_of(kPromoteSteps, kKeyTiles);
      Split<4> p[kCount][kRowTiles];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (first + i >= kKeyTiles) continue;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          float (&tile)[4] = r_s[m][first + i];
          exponentiate(tile, m, first + i);
          const float a[4] = {tile[0], tile[2], tile[1], tile[3]};
          p[i][m].set(a);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        float sum[kRowTiles][2][4] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (first + i >= kKeyTiles) continue;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            uint32_t r[2];
#pragma unroll
            for (int x = 0; x < 2; ++x) {
              const uint32_t addr = Layout::step(lane.addr[x], 2 * (n + j));
              r[x] = ptx::ld_shared_b32(addr + (first + i) * 8 * Layout::kRowBytes);
            }
            Split<2> v;
            v.set(r);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) mma(sum[m][j], p[i][m], v);
          }
        }
        promote(r_o, sum, n);
      }
    }
  }

  // r += A^T B, as MmaF32Acc does. Contraction index t stands for row 2t, t + 4 for row 2t + 1 of
  // both, whose chunks lie in different banks.
  template <int kDepth, class LayoutA, class LayoutB, int kRowTiles, int kColumnTiles>
  __device__ static void add_transposed_product(float (&r)[kRowTiles][kColumnTiles][4],
                                                uint32_t s_a_addr, int a_column, uint32_t s_b_addr,
                                                int b_column, int num_tiles, int lane_idx) {
    const int row = (lane_idx & 3) * 2, column = lane_idx >> 2;
    add_steps<kDepth, kColumnTiles>(
        r, num_tiles,
        [&](uint32_t (&a)[4], int k, int m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[i] = load<LayoutA>(s_a_addr, k + row + i / 2, a_column + m * 16 + column + i % 2 * 8);
          }
        },
        [&](uint32_t (&b)[2], int k, int n) {
#pragma unroll
          for (int i = 0; i < 2; ++i)
            b[i] = load<LayoutB>(s_b_addr, k + row + i, b_column + n * 8 + column);
        });
  }

  // r += A B, as MmaF32Acc does.
  template <int kDepth, class LayoutA, class LayoutB, int kRowTiles, int kColumnTiles>
  __device__ static void add_product(float (&r)[kRowTiles][kColumnTiles][4], uint32_t s_a_addr,
                                     int a_row, uint32_t s_b_addr, int b_column, int num_tiles,
                                     int lane_idx) {
    const int row = (lane_idx & 3) * 2, column = lane_idx >> 2;
    add_steps<kDepth, kColumnTiles>(
        r, num_tiles,
        [&](uint32_t (&a)[4], int k, int m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[i] = load<LayoutA>(s_a_addr, a_row + m * 16 + column + i % 2 * 8, k + row + i / 2);
          }
        },
        [&](uint32_t (&b)[2], int k, int n) {
#pragma unroll
          for (int i = 0; i < 2; ++i)
            b[i] = load<LayoutB>(s_b_addr, k + row + i, b_column + n * 8 + column);
        });
  }

  // Stores two neighbours of a row of a tile as operands; `column` is even.
  template <class Layout>
  __device__ static void store_pair(uint32_t s_tile_addr, int row, int column, float left,
                                    float right) {
    const uint32_t s_chunk_addr = s_tile_addr + Layout::offset(row, column / 4);
    const uint64_t both = static_cast<uint64_t>(__float_as_uint(right)) << 32;
    ptx::st_shared_b64(s_chunk_addr + column % 4 * 4,
                       static_cast<int64_t>(both | __float_as_uint(left)));
  }

 private:
  template <class Layout>
  __device__ static uint32_t load(uint32_t s_tile_addr, int row, int column) {
    return ptx::ld_shared_b32(s_tile_addr + Layout::offset(row, column / 4) + column % 4 * 4);
  }

  // r += A B in steps of 8; load_a(bits, k, m) and load_b(bits, k, n) give the fragments of a step.
  template <int kDepth, int kColumnTiles, int kRowTiles, class LoadA, class LoadB>
  __device__ static void add_steps(float (&r)[kRowTiles][kColumnTiles][4], int num_tiles,
                                   LoadA load_a, LoadB load_b) {
    constexpr int kSteps = kDepth / 8, kCount = min_of(kPromoteSteps / 2, kSteps);
#pragma unroll 1
    for (int first = 0; first < kSteps; first += kCount) {
      Split<4> a[kCount][kRowTiles];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          uint32_t bits[4];
          load_a(bits, (first + i) * 8, m);
          a[i][m].set(bits);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        if (n >= num_tiles) continue;
        float sum[kRowTiles][2][4] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            uint32_t bits[2];
            load_b(bits, (first + i) * 8, n + j);
            Split<2> b;
            b.set(bits);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) mma(sum[m][j], a[i][m], b);
          }
        }
        promote(r, sum, n);
      }
    }
  }

  template <int kCount>
  struct Split {
    uint32_t high[kCount];
    uint32_t low[kCount];

    __device__ void set(const float (&x)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        high[i] = ptx::cvt_tf32(x[i]);
        if constexpr (kProducts == 3) low[i] = ptx::cvt_tf32(x[i] - __int_as_float(high[i]));
      }
    }

    __device__ void set(const uint32_t (&bits)[kCount]) {
      float x[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = __int_as_float(bits[i]);
      set(x);
    }
  };

  // Small products first, so that they are not lost against the large one.
  __device__ static void mma(float (&c)[4], const Split<4>& a, const Split<2>& b) {
    if constexpr (kProducts == 3) {
      ptx::mma_m16n8k8_tf32(c, a.low, b.high);
      ptx::mma_m16n8k8_tf32(c, a.high, b.low);
    }
    ptx::mma_m16n8k8_tf32(c, a.high, b.high);
  }

  // result[m][n + j] += sum[m][j]
  template <int kRowTiles, int kTiles>
  __device__ static void promote(float (&result)[kRowTiles][kTiles][4],
                                 const float (&sum)[kRowTiles][2][4], int n) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) result[m][n + j][i] += sum[m][j][i];
      }
    }
  }
};

}  // namespace jitattn

// Numerics classes f16x3 and f16x1: fp32 operands split into hi/lo fp16 parts, adjacent in a row as
// [high | low], or rounded to the high part only; scaled by powers of two so that little
// underflows in fp16 (prepare/split_fp32.cuh). Three products of mma.m16n8k16, or one, where
// TF32 takes as many at half the rate, and splits in the main loop.
//
// f16x3: sums over a few columns of Q and over 64 keys are promoted, as in mma/tf32.cuh. low * low
// is below 2^-22 and omitted. Backward kernels split P and dS as well.
#pragma once

#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/mma/f32_acc.cuh"
#include "jitattn/tile/mma/split_p.cuh"
#include "jitattn/tile/two_level_output.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <int kProducts>  // 3 or 1
struct MmaF16Parts : MmaF32Acc<Dtype::kFp16> {
  static constexpr bool kIsSplit = kProducts == 3;
  // NOTE: a member of the class; inside the function with the lambdas, it crashes NVRTC 13.0.
  static constexpr int kParts = kIsSplit ? 2 : 1;
  using Base = MmaF32Acc<Dtype::kFp16>;
  using Split = MmaSplitP<Dtype::kFp16>;
  static constexpr int kPromoteSteps = 4;       // of 16 keys
  static constexpr int kPromoteScoreSteps = 4;  // of 16 columns
  static constexpr int kLift = kIsSplit ? Split::kLift : Base::kLift;
  static constexpr int kMaxSlack = kIsSplit ? Split::kMaxSlack : Base::kMaxSlack;

  // r_s += Q K^T over kDim columns of a part.
  template <int kDim, int kRowTiles, int kKeyTiles>
  __device__ static void add_scores(float (&r_s)[kRowTiles][kKeyTiles][4], uint32_t q_addr,
                                    uint32_t k_addr) {
    if constexpr (!kIsSplit) {
      Base::template add_scores<kDim>(r_s, q_addr, k_addr);
    } else {
      using Layout = Swizzle<kDim / 4>;
      constexpr int kLow = kDim / 8;  // chunks before the low parts
      constexpr int kSteps = kDim / 16, kCount = min_of(kPromoteScoreSteps, kSteps);
#pragma unroll
      for (int first = 0; first < kSteps; first += kCount) {
        uint32_t high[kCount][kRowTiles][4], low[kCount][kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int column = 2 * (first + i);  // in chunks
          if (first + i >= kSteps) continue;
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            const int rows = m * 16 * Layout::kRowBytes;
            ptx::ldmatrix_x4(high[i][m], Layout::step(q_addr, column) + rows);
            ptx::ldmatrix_x4(low[i][m], Layout::step(q_addr, column + kLow) + rows);
          }
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
          float sum[kRowTiles][2][4] = {};
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const int column = 2 * (first + i);
            if (first + i >= kSteps) continue;
            uint32_t k_high[4], k_low[4];  // operands B of key tiles n and n + 1
            const int keys = n * 8 * Layout::kRowBytes;
            ptx::ldmatrix_x4(k_high, Layout::step(k_addr, column) + keys);
            ptx::ldmatrix_x4(k_low, Layout::step(k_addr, column + kLow) + keys);
            add_products(sum, high[i], low[i], k_high, k_low);
          }
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
              for (int i = 0; i < 4; ++i) r_s[m][n + j][i] += sum[m][j][i];
            }
          }
        }
      }
    }
  }

  // r_o += scale * P V with P = exponentiate(r_s), as MmaF32Acc does; kChunks covers all parts of a
  // row.
  template <int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks, class Exponentiate>
  __device__ static void add_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                    float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const LaneV<kChunks>& lane, float scale,
                                    Exponentiate exponentiate) {
    using Layout = Swizzle<kChunks>;
    static_assert(kChunks == kParts * kColumnTiles);
    auto pack_parts = [](uint32_t (&part)[kParts], float left, float right) {
      if constexpr (kIsSplit) {
        Split::split(part[0], part[1], left, right);
      } else {
        part[0] = Base::pack(left, right);
      }
    };
    auto multiply = [&](auto& sum, const uint32_t (&p)[kParts][kRowTiles][4], int step, int n) {
      uint32_t v_high[4], v_low[4];  // operands B of column tiles n and n + 1
      const int keys = step * 16 * Layout::kRowBytes;
      ptx::ldmatrix_x4_trans(v_high, Layout::step(lane.addr, n) + keys);
      if constexpr (kIsSplit) {
        ptx::ldmatrix_x4_trans(v_low, Layout::step(lane.addr, n + kColumnTiles) + keys);
      }
      add_products(sum, p[0], p[kParts - 1], v_high, v_low);
    };
    auto add = [&](float (&out)[4], const float (&sum)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = fmaf(sum[i], scale, out[i]);
    };
    add_two_level_output<float[4], kParts, kPromoteSteps>(r_o, r_s, exponentiate, pack_parts,
                                                          multiply, add);
  }

  // r_s += scale * Q K^T for few rows: all sums at a time, which takes fewer registers than holding
  // the fragments of Q.
  template <int kDim, int kRowTiles, int kKeyTiles>
  __device__ static void add_scaled_scores(float (&r_s)[kRowTiles][kKeyTiles][4], uint32_t q_addr,
                                           uint32_t k_addr, float scale) {
    using Layout = Swizzle<kDim / 4>;
    constexpr int kLow = kDim / 8, kSteps = kDim / 16;
#pragma unroll
    for (int first = 0; first < kSteps; first += kPromoteScoreSteps) {
      float sum[kKeyTiles / 2][kRowTiles][2][4] = {};
#pragma unroll
      for (int step = first; step < min_of(first + kPromoteScoreSteps, kSteps); ++step) {
        uint32_t high[kRowTiles][4], low[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const int rows = m * 16 * Layout::kRowBytes;
          ptx::ldmatrix_x4(high[m], Layout::step(q_addr, 2 * step) + rows);
          ptx::ldmatrix_x4(low[m], Layout::step(q_addr, 2 * step + kLow) + rows);
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
          uint32_t k_high[4], k_low[4];
          const int keys = n * 8 * Layout::kRowBytes;
          ptx::ldmatrix_x4(k_high, Layout::step(k_addr, 2 * step) + keys);
          ptx::ldmatrix_x4(k_low, Layout::step(k_addr, 2 * step + kLow) + keys);
          add_products(sum[n / 2], high, low, k_high, k_low);
        }
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2)
        add_scaled(r_s, sum[n / 2], n, [&](int) { return scale; });
    }
  }

  // r += scale * A^T B, as MmaF32Acc does; the kParts parts of A and of B are adjacent in a row.
  // scale_of(k, m): scale of rows k .. of A and of B, for row tile m of r; constant over kEven
  // rows.
  template <int kDepth, int kEven, class LayoutA, class LayoutB, int kRowTiles, int kColumnTiles,
            class ScaleOf>
  __device__ static void add_transposed_product(float (&r)[kRowTiles][kColumnTiles][4],
                                                uint32_t s_a_addr, int a_column, uint32_t s_b_addr,
                                                int b_column, int num_tiles, int lane_idx,
                                                ScaleOf scale_of) {
    constexpr int kLow = LayoutA::kRowBytes / 32;             // chunks before the low parts
    const int block = lane_idx / 8, in_block = lane_idx % 8;  // of the 8x8 blocks of an ldmatrix
    const int row = block / 2 * 8 + in_block, chunk = a_column / 8 + block % 2;
    add_parts<kDepth, kEven, LayoutB>(r, s_b_addr, b_column, num_tiles, lane_idx, scale_of,
                                      [&](uint32_t (&a)[4], int k, int m, bool is_low) {
                                        const int own = chunk + m * 2 + (is_low ? kLow : 0);
                                        ptx::ldmatrix_x4_trans(
                                            a, s_a_addr + LayoutA::offset(k + row, own));
                                      });
  }

  // r += scale * A B, as MmaF32Acc does. scale_of(k, m): scale of columns k .. of A and rows of B.
  template <int kDepth, int kEven, class LayoutA, class LayoutB, int kRowTiles, int kColumnTiles,
            class ScaleOf>
  __device__ static void add_product(float (&r)[kRowTiles][kColumnTiles][4], uint32_t s_a_addr,
                                     int a_row, uint32_t s_b_addr, int b_column, int num_tiles,
                                     int lane_idx, ScaleOf scale_of) {
    constexpr int kLow = LayoutA::kRowBytes / 32;
    const int row = a_row + (lane_idx & 15), chunk = lane_idx >> 4;
    add_parts<kDepth, kEven, LayoutB>(r, s_b_addr, b_column, num_tiles, lane_idx, scale_of,
                                      [&](uint32_t (&a)[4], int k, int m, bool is_low) {
                                        const int own = chunk + k / 8 + (is_low ? kLow : 0);
                                        ptx::ldmatrix_x4(
                                            a, s_a_addr + LayoutA::offset(row + m * 16, own));
                                      });
  }

  // Stores two neighbours of a row, times `scale`, as hi and lo parts; `column` is even.
  template <class Layout>
  __device__ static void store_pair(uint32_t s_tile_addr, int row, int column, float left,
                                    float right, float scale) {
    constexpr int kLow = Layout::kRowBytes / 32;
    uint32_t high, low;
    Split::split(high, low, left * scale, right * scale);
    const uint32_t s_addr = s_tile_addr + column % 8 * 2;
    ptx::st_shared_b32(s_addr + Layout::offset(row, column / 8), high);
    ptx::st_shared_b32(s_addr + Layout::offset(row, column / 8 + kLow), low);
  }

 private:
  // r += scale * A B in steps of 16; load_a(bits, k, m, is_low) gives a fragment of A.
  template <int kDepth, int kEven, class LayoutB, int kRowTiles, int kColumnTiles, class ScaleOf,
            class LoadA>
  __device__ static void add_parts(float (&r)[kRowTiles][kColumnTiles][4], uint32_t s_b_addr,
                                   int b_column, int num_tiles, int lane_idx, ScaleOf scale_of,
                                   LoadA load_a) {
    static_assert(kIsSplit);
    constexpr int kLow = LayoutB::kRowBytes / 32;
    // At most two steps between promotions, since the fragments of A stay in registers; not
    // unrolled, since that would keep the addresses of all steps in registers too.
    constexpr int kCount = min_of(2, min_of(kDepth, kEven) / 16);
#pragma unroll 1
    for (int first = 0; first < kDepth; first += kCount * 16) {
      uint32_t high[kCount][kRowTiles][4], low[kCount][kRowTiles][4];
      float scale[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        scale[m] = scale_of(first, m);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          load_a(high[i][m], first + i * 16, m, false);
          load_a(low[i][m], first + i * 16, m, true);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        if (n >= num_tiles) continue;
        float sum[kRowTiles][2][4] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int row = first + i * 16 + (lane_idx & 15);
          const int chunk = b_column / 8 + n + (lane_idx >> 4);
          uint32_t b_high[4], b_low[4];  // operands B of column tiles n and n + 1
          ptx::ldmatrix_x4_trans(b_high, s_b_addr + LayoutB::offset(row, chunk));
          ptx::ldmatrix_x4_trans(b_low, s_b_addr + LayoutB::offset(row, chunk + kLow));
          add_products(sum, high[i], low[i], b_high, b_low);
        }
        add_scaled(r, sum, n, [&](int m) { return scale[m]; });
      }
    }
  }

  // r[m][n + j] += scale_of(m) * sum[m][j]
  template <int kRowTiles, int kTiles, class ScaleOf>
  __device__ static void add_scaled(float (&r)[kRowTiles][kTiles][4],
                                    const float (&sum)[kRowTiles][2][4], int n, ScaleOf scale_of) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r[m][n + j][i] = fmaf(sum[m][j][i], scale_of(m), r[m][n + j][i]);
        }
      }
    }
  }

  // sum += A B over both parts; operands B of two column tiles.
  template <int kRowTiles>
  __device__ static void add_products(float (&sum)[kRowTiles][2][4],
                                      const uint32_t (&high)[kRowTiles][4],
                                      const uint32_t (&low)[kRowTiles][4],
                                      const uint32_t (&b_high)[4], const uint32_t (&b_low)[4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (kIsSplit) {
          mma(sum[m][j], low[m], b_high[2 * j], b_high[2 * j + 1]);
          mma(sum[m][j], high[m], b_low[2 * j], b_low[2 * j + 1]);
        }
        mma(sum[m][j], high[m], b_high[2 * j], b_high[2 * j + 1]);
      }
    }
  }
};

}  // namespace jitattn

// Numerics class f16x3: fp32 operands as two fp16 parts each, side by side in a row: [high | low],
// scaled by powers of two so that nothing of them is below fp16 (split_halves.cuh); three products
// of mma.m16n8k16 each, where TF32 takes three of half the rate and splits in the main loop.
//
// Sums of 64 keys are promoted, as in mma_tf32.cuh. low * low is below 2^-22 and left out.
#pragma once

#include "jitattn/element.cuh"
#include "jitattn/enums.cuh"
#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/mma_f32_acc.cuh"
#include "jitattn/tile/mma_split_p.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

struct MmaF16x3 : MmaF32Acc<Dtype::kFp16> {
  using Base = MmaF32Acc<Dtype::kFp16>;
  using Split = MmaSplitP<Dtype::kFp16>;
  static constexpr int kPromoteSteps = 4;  // of 16 keys
  static constexpr int kLift = Split::kLift, kMaxSlack = Split::kMaxSlack;

  // r_s += Q K^T over kDim columns of both parts.
  template <int kDim, int kRowTiles, int kKeyTiles>
  __device__ static void add_scores(float (&r_s)[kRowTiles][kKeyTiles][4], uint32_t q_addr,
                                    uint32_t k_addr) {
    using Layout = Swizzle<kDim / 4>;
    constexpr int kLow = kDim / 8;  // chunks before the low parts
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t high[kRowTiles][4], low[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const int rows = m * 16 * Layout::kRowBytes;
        ptx::ldmatrix_x4(high[m], Layout::step(q_addr, 2 * d) + rows);
        ptx::ldmatrix_x4(low[m], Layout::step(q_addr, 2 * d + kLow) + rows);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t k_high[4], k_low[4];  // operands B of key tiles n and n + 1
        const int keys = n * 8 * Layout::kRowBytes;
        ptx::ldmatrix_x4(k_high, Layout::step(k_addr, 2 * d) + keys);
        ptx::ldmatrix_x4(k_low, Layout::step(k_addr, 2 * d + kLow) + keys);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            mma(r_s[m][n + j], low[m], k_high[2 * j], k_high[2 * j + 1]);
            mma(r_s[m][n + j], high[m], k_low[2 * j], k_low[2 * j + 1]);
            mma(r_s[m][n + j], high[m], k_high[2 * j], k_high[2 * j + 1]);
          }
        }
      }
    }
  }

  // r_o += scale * P V with P = exponentiate(r_s), as MmaF32Acc has it; kChunks of both parts of a
  // row.
  template <int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks, class Exponentiate>
  __device__ static void add_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                    float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const LaneV<kChunks>& lane, float scale,
                                    Exponentiate exponentiate) {
    using Layout = Swizzle<kChunks>;
    static_assert(kChunks == 2 * kColumnTiles);
    constexpr int kSteps = kKeyTiles / 2;
#pragma unroll
    for (int first = 0; first < kSteps; first += kPromoteSteps) {
      constexpr int kCount = min_of(kPromoteSteps, kSteps);
      uint32_t high[kCount][kRowTiles][4], low[kCount][kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int step = first + i;
        if (step >= kSteps) continue;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          float (&left)[4] = r_s[m][2 * step], (&right)[4] = r_s[m][2 * step + 1];
          exponentiate(left, m, 2 * step);
          exponentiate(right, m, 2 * step + 1);
          Split::split(high[i][m][0], low[i][m][0], left[0], left[1]);
          Split::split(high[i][m][1], low[i][m][1], left[2], left[3]);
          Split::split(high[i][m][2], low[i][m][2], right[0], right[1]);
          Split::split(high[i][m][3], low[i][m][3], right[2], right[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        float sum[kRowTiles][2][4] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int step = first + i;
          if (step >= kSteps) continue;
          uint32_t v_high[4], v_low[4];  // operands B of column tiles n and n + 1
          const int keys = step * 16 * Layout::kRowBytes;
          ptx::ldmatrix_x4_trans(v_high, Layout::step(lane.addr, n) + keys);
          ptx::ldmatrix_x4_trans(v_low, Layout::step(lane.addr, n + kColumnTiles) + keys);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              mma(sum[m][j], low[i][m], v_high[2 * j], v_high[2 * j + 1]);
              mma(sum[m][j], high[i][m], v_low[2 * j], v_low[2 * j + 1]);
              mma(sum[m][j], high[i][m], v_high[2 * j], v_high[2 * j + 1]);
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              r_o[m][n + j][i] = fmaf(sum[m][j][i], scale, r_o[m][n + j][i]);
            }
          }
        }
      }
    }
  }
};

}  // namespace jitattn

// Numerics classes f16x3 and f16x1: fp32 operands as two fp16 parts each, side by side in a row,
// [high | low], or as the high one only; scaled by powers of two so that little of them is below
// fp16 (split_halves.cuh). Three products of mma.m16n8k16 each, or one, where TF32 takes as many of
// half the rate, and splits in the main loop.
//
// f16x3: sums of few columns of Q and of 64 keys are promoted, as in mma_tf32.cuh. low * low is
// below 2^-22 and left out.
#pragma once

#include "jitattn/element.cuh"
#include "jitattn/enums.cuh"
#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/mma_f32_acc.cuh"
#include "jitattn/tile/mma_split_p.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <int kProducts>  // 3 or 1
struct MmaF16Parts : MmaF32Acc<Dtype::kFp16> {
  static constexpr bool kIsSplit = kProducts == 3;
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

  // r_o += scale * P V with P = exponentiate(r_s), as MmaF32Acc has it; kChunks of all parts of a
  // row.
  template <int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks, class Exponentiate>
  __device__ static void add_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                    float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const LaneV<kChunks>& lane, float scale,
                                    Exponentiate exponentiate) {
    using Layout = Swizzle<kChunks>;
    static_assert(kChunks == (kIsSplit ? 2 : 1) * kColumnTiles);
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
          const float p[4][2] = {
              {left[0], left[1]}, {left[2], left[3]}, {right[0], right[1]}, {right[2], right[3]}};
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            if constexpr (kIsSplit) {
              Split::split(high[i][m][x], low[i][m][x], p[x][0], p[x][1]);
            } else {
              high[i][m][x] = Base::pack(p[x][0], p[x][1]);
            }
          }
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
          if constexpr (kIsSplit) {
            ptx::ldmatrix_x4_trans(v_low, Layout::step(lane.addr, n + kColumnTiles) + keys);
          }
          add_products(sum, high[i], low[i], v_high, v_low);
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

 private:
  // sum += A B of both parts; operands B of two tiles of columns.
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

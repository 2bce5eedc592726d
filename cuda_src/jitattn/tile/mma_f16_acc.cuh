// Numerics class f16_acc: fp16 operands, P V in fp16 accumulators, mma.m16n8k16. GeForce cards of
// sm_86 and sm_89 run these at twice the rate.
//
// Sums of 64 keys are added to fp32 ones: over all keys in fp16 the error would be six times as
// large. P is at most 1 here (kMaxSlack), so that 64 products fit fp16 for |V| up to 1023; beyond
// that sums become infinite, and the result with them. (notes/0007)
#pragma once

#include "jitattn/element.cuh"
#include "jitattn/enums.cuh"
#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/ptx/mma_sm80.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/mma_f32_acc.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

struct MmaF16Acc : MmaF32Acc<Dtype::kFp16> {
  using Base = MmaF32Acc<Dtype::kFp16>;
  static constexpr int kMaxSlack = 0;
  static constexpr int kPromoteSteps = 4;  // of 16 keys

  // r_o += P V with P = exponentiate(r_s), as MmaF32Acc has it.
  template <int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks, class Exponentiate>
  __device__ static void add_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                    float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const LaneV<kChunks>& lane, Exponentiate exponentiate) {
    using Layout = Swizzle<kChunks>;
    constexpr int kSteps = kKeyTiles / 2;
#pragma unroll
    for (int first = 0; first < kSteps; first += kPromoteSteps) {
      constexpr int kCount = min_of(kPromoteSteps, kSteps);
      uint32_t p[kCount][kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int step = first + i;
        if (step >= kSteps) continue;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          float (&left)[4] = r_s[m][2 * step], (&right)[4] = r_s[m][2 * step + 1];
          exponentiate(left, m, 2 * step);
          exponentiate(right, m, 2 * step + 1);
          p[i][m][0] = pack(left[0], left[1]);
          p[i][m][1] = pack(left[2], left[3]);
          p[i][m][2] = pack(right[0], right[1]);
          p[i][m][3] = pack(right[2], right[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t sum[kRowTiles][2][2] = {};  // pairs of fp16
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int step = first + i;
          if (step >= kSteps) continue;
          uint32_t v[4];  // operand B of column tiles n and n + 1
          ptx::ldmatrix_x4_trans(v, Layout::step(lane.addr, n) + step * 16 * Layout::kRowBytes);
          const uint32_t left[2] = {v[0], v[1]}, right[2] = {v[2], v[3]};
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            ptx::mma_m16n8k16_f16_f16(sum[m][0], p[i][m], left);
            ptx::mma_m16n8k16_f16_f16(sum[m][1], p[i][m], right);
          }
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint32_t pair = sum[m][j][half];
              r_o[m][n + j][2 * half] += ptx::f16_to_f32(static_cast<uint16_t>(pair));
              r_o[m][n + j][2 * half + 1] += ptx::f16_to_f32(static_cast<uint16_t>(pair >> 16));
            }
          }
        }
      }
    }
  }
};

}  // namespace jitattn

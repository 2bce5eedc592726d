// Numerics class split_p: 16-bit operands, P as a sum of two 16-bit parts, mma.m16n8k16.
//
// Products of 16-bit numbers are exact in fp32, so that of all roundings that of P is the largest:
// P = high + low keeps 22 (fp16) or 16 (bf16) of its bits, for two MMAs a product. Sums are
// promoted as in mma_tf32.cuh, every 64 keys, since the tensor cores truncate. (notes/0007)
#pragma once

#include "jitattn/element.cuh"
#include "jitattn/enums.cuh"
#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/mma_f32_acc.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <Dtype kDtype>
struct MmaSplitP : MmaF32Acc<kDtype> {
  using Base = MmaF32Acc<kDtype>;
  static constexpr int kPromoteSteps = 4;  // of 16 keys
  // fp16: P is up to 2^15, so that low parts of small weights stay above the end of fp16.
  static constexpr int kLift = kDtype == Dtype::kFp16 ? 14 : 0;
  static constexpr int kMaxSlack = kDtype == Dtype::kFp16 ? 1 : Base::kMaxSlack;

  // r_o += P V with P = exponentiate(r_s), as MmaF32Acc has it.
  template <int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks, class Exponentiate>
  __device__ static void add_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                    float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const typename Base::template LaneV<kChunks>& lane,
                                    Exponentiate exponentiate) {
    using Layout = Swizzle<kChunks>;
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
          split(high[i][m][0], low[i][m][0], left[0], left[1]);
          split(high[i][m][1], low[i][m][1], left[2], left[3]);
          split(high[i][m][2], low[i][m][2], right[0], right[1]);
          split(high[i][m][3], low[i][m][3], right[2], right[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        float sum[kRowTiles][2][4] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int step = first + i;
          if (step >= kSteps) continue;
          uint32_t v[4];  // operand B of column tiles n and n + 1
          ptx::ldmatrix_x4_trans(v, Layout::step(lane.addr, n) + step * 16 * Layout::kRowBytes);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            Base::mma(sum[m][0], low[i][m], v[0], v[1]);
            Base::mma(sum[m][1], low[i][m], v[2], v[3]);
            Base::mma(sum[m][0], high[i][m], v[0], v[1]);
            Base::mma(sum[m][1], high[i][m], v[2], v[3]);
          }
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) r_o[m][n + j][i] += sum[m][j][i];
          }
        }
      }
    }
  }

  // Two neighbours of P as the sum of two parts.
  __device__ static void split(uint32_t& high, uint32_t& low, float left, float right) {
    using Element = Scalar<kDtype>;
    high = Base::pack(left, right);
    low = Base::pack(left - Element::load(static_cast<uint16_t>(high)),
                     right - Element::load(static_cast<uint16_t>(high >> 16)));
  }
};

}  // namespace jitattn

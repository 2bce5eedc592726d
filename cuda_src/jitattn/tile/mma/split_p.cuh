// Numerics class split_p: 16-bit operands, P split into two 16-bit parts, mma.m16n8k16.
//
// Products of 16-bit numbers are exact in fp32, so that the rounding of P is the largest of all:
// P = high + low keeps 22 (fp16) or 16 (bf16) of its bits, for two MMAs per product. Sums are
// promoted every 64 keys, as in mma/tf32.cuh, since tensor cores truncate. (notes/0007)
#pragma once

#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/mma/f32_acc.cuh"
#include "jitattn/tile/two_level_output.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <Dtype kDtype>
struct MmaSplitP : MmaF32Acc<kDtype> {
  using Base = MmaF32Acc<kDtype>;
  static constexpr int kPromoteSteps = 4;  // of 16 keys
  // fp16: P reaches 2^15, so that the low parts of small weights do not underflow.
  static constexpr int kLift = kDtype == Dtype::kFp16 ? 14 : 0;
  static constexpr int kMaxSlack = kDtype == Dtype::kFp16 ? 1 : Base::kMaxSlack;

  // r_o += P V with P = exponentiate(r_s), as MmaF32Acc does.
  template <int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks, class Exponentiate>
  __device__ static void add_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                    float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const typename Base::template LaneV<kChunks>& lane,
                                    Exponentiate exponentiate) {
    using Layout = Swizzle<kChunks>;
    auto pack = [](uint32_t (&part)[2], float left, float right) {
      split(part[0], part[1], left, right);
    };
    auto multiply = [&](auto& sum, const uint32_t (&p)[2][kRowTiles][4], int step, int n) {
      uint32_t v[4];  // operand B of column tiles n and n + 1
      ptx::ldmatrix_x4_trans(v, Layout::step(lane.addr, n) + step * 16 * Layout::kRowBytes);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        Base::mma(sum[m][0], p[1][m], v[0], v[1]);
        Base::mma(sum[m][1], p[1][m], v[2], v[3]);
        Base::mma(sum[m][0], p[0][m], v[0], v[1]);
        Base::mma(sum[m][1], p[0][m], v[2], v[3]);
      }
    };
    auto add = [](float (&out)[4], const float (&sum)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] += sum[i];
    };
    add_two_level_output<float[4], 2, kPromoteSteps>(r_o, r_s, exponentiate, pack, multiply, add);
  }

  // Splits two neighbours of P into two parts.
  __device__ static void split(uint32_t& high, uint32_t& low, float left, float right) {
    using Element = Scalar<kDtype>;
    high = Base::pack(left, right);
    low = Base::pack(left - Element::load(static_cast<uint16_t>(high)),
                     right - Element::load(static_cast<uint16_t>(high >> 16)));
  }
};

}  // namespace jitattn

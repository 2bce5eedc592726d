// Numerics class f16_acc: fp16 operands, P V in fp16 accumulators, mma.m16n8k16. GeForce GPUs of
// sm_86 and sm_89 run these at twice the rate.
//
// Sums over 64 keys are promoted to fp32: over all keys, fp16 sums would have six times the error.
// P is at most 1 here (kMaxSlack), so that 64 products fit fp16 for |V| up to 1023; larger values
// overflow to infinity in the result. (notes/0007)
#pragma once

#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/ptx/mma_sm80.cuh"
#include "jitattn/tile/accumulator.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/mma/f32_acc.cuh"
#include "jitattn/tile/two_level_output.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

struct MmaF16Acc : MmaF32Acc<Dtype::kFp16> {
  using Base = MmaF32Acc<Dtype::kFp16>;
  static constexpr int kMaxSlack = 0;
  static constexpr int kPromoteSteps = 4;  // of 16 keys

  // r_o += P V with P = exponentiate(r_s), as MmaF32Acc does.
  template <int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks, class Exponentiate>
  __device__ static void add_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                    float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const LaneV<kChunks>& lane, Exponentiate exponentiate) {
    using Layout = Swizzle<kChunks>;
    auto pack_one = [](uint32_t (&part)[1], float left, float right) {
      part[0] = pack(left, right);
    };
    auto multiply = [&](auto& sum, const uint32_t (&p)[1][kRowTiles][4], int step, int n) {
      uint32_t v[4];  // operand B of column tiles n and n + 1
      ptx::ldmatrix_x4_trans(v, Layout::step(lane.addr, n) + step * 16 * Layout::kRowBytes);
      const uint32_t left[2] = {v[0], v[1]}, right[2] = {v[2], v[3]};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::mma_m16n8k16_f16_f16(sum[m][0], p[0][m], left);
        ptx::mma_m16n8k16_f16_f16(sum[m][1], p[0][m], right);
      }
    };
    auto add = [](float (&out)[4], const uint32_t (&sum)[2]) {  // pairs of fp16
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        out[2 * half] += low_of(sum[half]);
        out[2 * half + 1] += high_of(sum[half]);
      }
    };
    add_two_level_output<uint32_t[2], 1, kPromoteSteps>(r_o, r_s, exponentiate, pack_one, multiply,
                                                        add);
  }
};

}  // namespace jitattn

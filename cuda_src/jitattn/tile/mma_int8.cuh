// Numerics class int8: 8-bit Q and K with a scale for every row of Q and every kQuantKeys keys,
// mma.m16n8k32 into integers; P V as MmaF32Acc has it. (quantize.cuh, notes/0007)
//
// In bytes, a fragment of m16n8k32 is one of m16n8k16 with two elements where that has one, so that
// tiles, addresses and ldmatrix are those of 16-bit tiles of half the width.
#pragma once

#include "jitattn/enums.cuh"
#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/ptx/mma_sm80.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/mma_f32_acc.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <Dtype kDtype>
struct MmaInt8 : MmaF32Acc<kDtype> {
  // The bits of 1.5 * 2^23: added to as integers, they are that number plus the sum, exactly, as
  // |sum| <= 256 * 127^2 < 2^22. No conversion is needed, and RowScale takes the number off again.
  static constexpr int32_t kOffsetBits = 0x4B400000;

  // r_s = Q K^T over kDim columns, plus that number; r_s is overwritten.
  template <int kDim, int kRowTiles, int kKeyTiles>
  __device__ static void add_scores(float (&r_s)[kRowTiles][kKeyTiles][4], uint32_t q_addr,
                                    uint32_t k_addr) {
    using Layout = Swizzle<kDim / 16>;
    int32_t sum[kRowTiles][kKeyTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = kOffsetBits;
      }
    }
#pragma unroll
    for (int d = 0; d < kDim / 32; ++d) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::ldmatrix_x4(q[m], Layout::step(q_addr, 2 * d) + m * 16 * Layout::kRowBytes);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t k[4];  // operand B of key tiles n and n + 1
        ptx::ldmatrix_x4(k, Layout::step(k_addr, 2 * d) + n * 8 * Layout::kRowBytes);
        const uint32_t left[2] = {k[0], k[1]}, right[2] = {k[2], k[3]};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma_m16n8k32_s8(sum[m][n], q[m], left);
          ptx::mma_m16n8k32_s8(sum[m][n + 1], q[m], right);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) r_s[m][n][i] = __int_as_float(sum[m][n][i]);
      }
    }
  }
};

}  // namespace jitattn

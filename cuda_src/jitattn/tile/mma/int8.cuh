// Numerics classes int8 and int8_f16: INT8 Q and K with one scale per row of Q and per kQuantKeys
// keys, mma.m16n8k32 with int32 accumulators; P V as in MmaF32Acc, in fp32 or, with int8_f16, in
// fp16 accumulators (two_level_accumulator.cuh). (prepare/quantize.cuh, notes/0007)
//
// In bytes, a fragment of m16n8k32 is a fragment of m16n8k16 with two elements in place of one, so
// that tiles, addresses and ldmatrix are those of 16-bit tiles of half the width.
#pragma once

#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/ptx/mma_sm80.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/mma/f32_acc.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// kDtypeV: dtype of V.
template <Dtype kDtypeV>
struct MmaInt8 : MmaF32Acc<kDtypeV> {
  // The bits of 1.5 * 2^23: an integer sum added to them gives the bits of 1.5 * 2^23 + sum,
  // exactly, as |sum| <= 256 * 127^2 < 2^22. This saves the conversion; RowScale subtracts the
  // constant.
  static constexpr int32_t kOffsetBits = 0x4B400000;

  // Fragments of a warp's rows of Q, for 32 columns.
  template <int kRowTiles>
  using Columns = uint32_t[kRowTiles][4];

  // Fragments of all columns, held for all steps.
  template <int kDim, int kRowTiles>
  __device__ static void load_q(Columns<kRowTiles> (&r_q)[kDim / 32], uint32_t q_addr) {
#pragma unroll
    for (int d = 0; d < kDim / 32; ++d) load_columns<kDim>(r_q[d], q_addr, d);
  }

  // r_s = Q K^T + 1.5 * 2^23 over kDim columns; r_s is overwritten. Q is given as fragments from
  // load_q, or as an address; lane addresses as fragment.cuh gives them for Q and K.
  template <int kDim, int kRowTiles, int kKeyTiles>
  __device__ static void add_scores(float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const Columns<kRowTiles> (&r_q)[kDim / 32], uint32_t k_addr) {
    multiply<kDim>(r_s, k_addr, [&](int d) -> const Columns<kRowTiles>& { return r_q[d]; });
  }
  template <int kDim, int kRowTiles, int kKeyTiles>
  __device__ static void add_scores(float (&r_s)[kRowTiles][kKeyTiles][4], uint32_t q_addr,
                                    uint32_t k_addr) {
    Columns<kRowTiles> columns;
    multiply<kDim>(r_s, k_addr, [&](int d) -> const Columns<kRowTiles>& {
      load_columns<kDim>(columns, q_addr, d);
      return columns;
    });
  }

 private:
  // Returns the fragments of columns 32 d and up.
  template <int kDim, int kRowTiles>
  __device__ static void load_columns(Columns<kRowTiles>& columns, uint32_t q_addr, int d) {
    using Layout = Swizzle<kDim / 16>;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      ptx::ldmatrix_x4(columns[m], Layout::step(q_addr, 2 * d) + m * 16 * Layout::kRowBytes);
    }
  }

  template <int kDim, int kRowTiles, int kKeyTiles, class ColumnsOfQ>
  __device__ static void multiply(float (&r_s)[kRowTiles][kKeyTiles][4], uint32_t k_addr,
                                  ColumnsOfQ columns_of_q) {
    using Layout = Swizzle<kDim / 16>;
    int32_t sum[kRowTiles][kKeyTiles][4];
#pragma unroll
    for (int d = 0; d < kDim / 32; ++d) {
      const Columns<kRowTiles>& q = columns_of_q(d);
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t k[4];  // operand B of key tiles n and n + 1
        ptx::ldmatrix_x4(k, Layout::step(k_addr, 2 * d) + n * 8 * Layout::kRowBytes);
        const uint32_t left[2] = {k[0], k[1]}, right[2] = {k[2], k[3]};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          if (d == 0) {
            ptx::mma_m16n8k32_s8(sum[m][n], q[m], left, kOffsetBits);
            ptx::mma_m16n8k32_s8(sum[m][n + 1], q[m], right, kOffsetBits);
          } else {
            ptx::mma_m16n8k32_s8(sum[m][n], q[m], left);
            ptx::mma_m16n8k32_s8(sum[m][n + 1], q[m], right);
          }
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

struct MmaInt8F16 : MmaInt8<Dtype::kFp16> {
  // Weights up to 2^(kLift + kMaxSlack) = 4, times 2048 values below 4 (prepare/quantize.cuh): sums
  // up to 2^15.
  static constexpr int kMaxSlack = 4;
  static constexpr int kLift = -2;
};

}  // namespace jitattn

// Numerics class f32_acc: 16-bit operands, fp32 accumulators, mma.m16n8k16.
#pragma once

#include "jitattn/enums.cuh"
#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/mma_sm80.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <Dtype kDtype>
struct MmaF32Acc {
  using Element = uint16_t;

  // Lane address in a V tile [keys][columns].
  template <int kChunks>
  struct LaneV {
    uint32_t addr;
    __device__ LaneV(uint32_t s_v_addr, int lane_idx)
        : addr(s_v_addr + lane_offset_row_first<kChunks>(lane_idx)) {}
    __device__ void advance(int bytes) { addr += bytes; }
  };

  // r_s += Q K^T over kDim columns; lane addresses as fragment.cuh gives them for Q and K.
  template <int kDim, int kRowTiles, int kKeyTiles>
  __device__ static void add_scores(float (&r_s)[kRowTiles][kKeyTiles][4], uint32_t q_addr,
                                    uint32_t k_addr) {
    using Layout = Swizzle<kDim / 8>;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::ldmatrix_x4(q[m], Layout::step(q_addr, 2 * d) + m * 16 * Layout::kRowBytes);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t k[4];  // operand B of key tiles n and n + 1
        ptx::ldmatrix_x4(k, Layout::step(k_addr, 2 * d) + n * 8 * Layout::kRowBytes);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma(r_s[m][n], q[m], k[0], k[1]);
          mma(r_s[m][n + 1], q[m], k[2], k[3]);
        }
      }
    }
  }

  // r_o += P V with P = exponentiate(r_s). exponentiate(tile, m) turns the scores of one n8 tile
  // into probabilities; it is called just before they are needed, so that exponentials and MMAs
  // overlap.
  template <int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks, class Exponentiate>
  __device__ static void add_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                    float (&r_s)[kRowTiles][kKeyTiles][4],
                                    const LaneV<kChunks>& lane, Exponentiate exponentiate) {
    using Layout = Swizzle<kChunks>;
#pragma unroll
    for (int step = 0; step < kKeyTiles / 2; ++step) {  // 16 keys
      uint32_t p[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        float (&left)[4] = r_s[m][2 * step], (&right)[4] = r_s[m][2 * step + 1];
        exponentiate(left, m, 2 * step);
        exponentiate(right, m, 2 * step + 1);
        // No shuffle: the accumulators of two n8 tiles are the A fragment of one k16 step.
        p[m][0] = pack(left[0], left[1]);
        p[m][1] = pack(left[2], left[3]);
        p[m][2] = pack(right[0], right[1]);
        p[m][3] = pack(right[2], right[3]);
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t v[4];  // operand B of column tiles n and n + 1
        ptx::ldmatrix_x4_trans(v, Layout::step(lane.addr, n) + step * 16 * Layout::kRowBytes);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma(r_o[m][n], p[m], v[0], v[1]);
          mma(r_o[m][n + 1], p[m], v[2], v[3]);
        }
      }
    }
  }

  // Two values rounded to the 16-bit type, `low` in the low half.
  __device__ static uint32_t pack(float low, float high) {
    if constexpr (kDtype == Dtype::kBf16) return ptx::pack_bf16x2(low, high);
    return ptx::pack_f16x2(low, high);
  }

 private:
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    if constexpr (kDtype == Dtype::kBf16) {
      ptx::mma_m16n8k16_bf16(c, a, b);
    } else {
      ptx::mma_m16n8k16_f16(c, a, b);
    }
  }
};

}  // namespace jitattn

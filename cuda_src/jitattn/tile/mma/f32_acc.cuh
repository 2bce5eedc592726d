// Numerics class f32_acc: 16-bit operands, fp32 accumulators, mma.m16n8k16.
#pragma once

#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/mma_sm80.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <Dtype kDtype>
struct MmaF32Acc {
  using Element = uint16_t;
  static constexpr int kMaxSlack = 8;  // slack of the running maximum: OnlineSoftmax
  static constexpr int kLift = 0;

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
  // overlap. Tiles of r_o are fp32, or pairs of fp16.
  template <class Tile, int kRowTiles, int kKeyTiles, int kColumnTiles, int kChunks,
            class Exponentiate>
  __device__ static void add_output(Tile (&r_o)[kRowTiles][kColumnTiles],
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

  // r += A^T B over kDepth rows of two shared tiles: A [kDepth][columns of kLayoutA], whose columns
  // from a_column on are the rows of r, and B [kDepth][...], from b_column on. Column tiles of r
  // from num_tiles on are left alone.
  template <int kDepth, class LayoutA, class LayoutB, int kRowTiles, int kColumnTiles>
  __device__ static void add_transposed_product(float (&r)[kRowTiles][kColumnTiles][4],
                                                uint32_t s_a_addr, int a_column, uint32_t s_b_addr,
                                                int b_column, int num_tiles, int lane_idx) {
    const int block = lane_idx / 8, row = lane_idx % 8;  // of the four 8x8 blocks of an ldmatrix
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::ldmatrix_x4_trans(a[m], s_a_addr + LayoutA::offset(k + block / 2 * 8 + row,
                                                                a_column / 8 + m * 2 + block % 2));
      }
      add_step<LayoutB>(r, a, s_b_addr, k, b_column, num_tiles, lane_idx);
    }
  }

  // r += A B over kDepth columns of A [rows][kDepth], from a_row on, and rows of B [kDepth][...].
  template <int kDepth, class LayoutA, class LayoutB, int kRowTiles, int kColumnTiles>
  __device__ static void add_product(float (&r)[kRowTiles][kColumnTiles][4], uint32_t s_a_addr,
                                     int a_row, uint32_t s_b_addr, int b_column, int num_tiles,
                                     int lane_idx) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::ldmatrix_x4(a[m], s_a_addr + LayoutA::offset(a_row + m * 16 + (lane_idx & 15),
                                                          k / 8 + (lane_idx >> 4)));
      }
      add_step<LayoutB>(r, a, s_b_addr, k, b_column, num_tiles, lane_idx);
    }
  }

  // Stores two neighbours of a row of a tile as operands; `column` is even.
  template <class Layout>
  __device__ static void store_pair(uint32_t s_tile_addr, int row, int column, float left,
                                    float right) {
    const uint32_t s_chunk_addr = s_tile_addr + Layout::offset(row, column / 8);
    ptx::st_shared_b32(s_chunk_addr + column % 8 * 2, pack(left, right));
  }

  // Packs two values rounded to the 16-bit type, `low` in the low half.
  __device__ static uint32_t pack(float low, float high) {
    if constexpr (kDtype == Dtype::kBf16) return ptx::pack_bf16x2(low, high);
    return ptx::pack_f16x2(low, high);
  }

 protected:
  // Multiplies one step of 16 rows of B, from row k on.
  template <class LayoutB, int kRowTiles, int kColumnTiles>
  __device__ static void add_step(float (&r)[kRowTiles][kColumnTiles][4],
                                  const uint32_t (&a)[kRowTiles][4], uint32_t s_b_addr, int k,
                                  int b_column, int num_tiles, int lane_idx) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      if (n >= num_tiles) continue;
      uint32_t b[4];  // operand B of column tiles n and n + 1
      ptx::ldmatrix_x4_trans(
          b, s_b_addr + LayoutB::offset(k + (lane_idx & 15), b_column / 8 + n + (lane_idx >> 4)));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma(r[m][n], a[m], b[0], b[1]);
        mma(r[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }

  __device__ static void mma(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(kDtype == Dtype::kFp16, "fp16 accumulators are for fp16 operands");
    const uint32_t b[2] = {b0, b1};
    ptx::mma_m16n8k16_f16_f16(c, a, b);
  }
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

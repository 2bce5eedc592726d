// Swizzled layout of the 16-byte chunks of a row-major tile in shared memory.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

// A tile of rows of kChunks 16-byte chunks.
//   logical view [rows, kChunks] -> stored view: chunk c of row r lands in chunk c ^ key(r)
// with key(r) = (r >> kShift) % kSpan, kSpan = gcd(kChunks, 8), kShift = log2(8 / kSpan).
// Eight consecutive rows then hold one logical chunk in eight different 16-byte bank groups, for
// every kChunks, so ldmatrix and cp.async are free of bank conflicts without padding rows. An odd
// kChunks needs no XOR for that, and has kSpan = 1. Rows 8 apart share a key.
template <int kChunks>
struct Swizzle {
  static constexpr int kSpan = kChunks % 8 == 0   ? 8
                               : kChunks % 4 == 0 ? 4
                               : kChunks % 2 == 0 ? 2
                                                  : 1;
  static constexpr int kShift = kSpan == 8 ? 0 : kSpan == 4 ? 1 : kSpan == 2 ? 2 : 3;
  static constexpr int kRowBytes = kChunks * 16;

  __host__ __device__ static constexpr int key(int row) { return (row >> kShift) & (kSpan - 1); }

  // Returns the byte offset of a chunk.
  __host__ __device__ static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ key(row)) << 4);
  }

  // Returns the byte address of chunk `chunk` (a compile-time constant after unrolling) in the row
  // of a lane whose address `lane_addr` is that of its chunk 0 or 1. The XOR may be applied to the
  // whole address because row starts are multiples of kSpan * 16 bytes.
  __device__ static uint32_t step(uint32_t lane_addr, int chunk) {
    return (lane_addr ^ ((chunk & (kSpan - 1)) << 4)) + ((chunk & ~(kSpan - 1)) << 4);
  }
};

namespace swizzle_check {

template <int kChunks>
constexpr bool is_conflict_free() {
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    unsigned bank_groups = 0;
    for (int row = 0; row < 8; ++row) {
      bank_groups |= 1u << ((Swizzle<kChunks>::offset(row, chunk) >> 4) & 7);
    }
    if (bank_groups != 0xffu) return false;
  }
  return true;
}

template <int kChunks>
constexpr bool is_bijection() {
  for (int row = 0; row < 8; ++row) {
    uint64_t seen = 0;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      seen |= 1ull << ((Swizzle<kChunks>::offset(row, chunk) >> 4) - row * kChunks);
    }
    if (seen != (kChunks == 64 ? ~0ull : (1ull << (kChunks & 63)) - 1)) return false;
  }
  return true;
}

}  // namespace swizzle_check
}  // namespace jitattn

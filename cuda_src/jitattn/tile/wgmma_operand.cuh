// Operands of wgmma in shared memory, as TMA writes them with 128-byte swizzle: a matrix [rows,
// columns] of 16-bit elements is stored in pages of 64 columns, page after page, each [rows][128 B].
// The 16-byte chunks of a row are permuted by row % 8, so a page begins at a multiple of 1024.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

constexpr int kPageColumns = 64, kPageRowBytes = 128;

// A matrix descriptor: PTX ISA, "wgmma matrix descriptor". Steps along the matrix change its low word
// only.
struct WgmmaDescriptor {
  uint32_t low, high;

  // lead: bytes between pages if rows are the dimension that is summed over, else unused.
  __device__ WgmmaDescriptor(uint32_t s_addr, uint32_t lead)
      : low((s_addr & 0x3ffff) >> 4 | lead >> 4 << 16), high(kSwizzle128B | kEightRows >> 4) {}

  // The same matrix from 16 step columns of kRows rows on, or from 16 step rows on.
  template <int kRows>
  __device__ uint64_t at_columns(int step) const {
    return plus((step % 4 * 32 + step / 4 * kRows * kPageRowBytes) >> 4);
  }
  __device__ uint64_t at_rows(int step) const { return plus((step * 16 * kPageRowBytes) >> 4); }

 private:
  static constexpr uint32_t kSwizzle128B = 1u << 30, kEightRows = 8 * kPageRowBytes;

  __device__ uint64_t plus(uint32_t step) const {
    return static_cast<uint64_t>(high) << 32 | (low + step);
  }
};

}  // namespace jitattn

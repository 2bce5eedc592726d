// Copies row-major tiles from global to shared memory with all threads of a CTA.
#pragma once

#include "jitattn/ptx/cp_async.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/swizzle.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Copies tiles of kRows rows of kDim elements, padded with zeros to kPaddedDim columns.
//
// A group of kThreadsPerRow lanes walks along a row, so that the swizzle key of a thread never
// changes and every address is a lane constant plus a multiple of the pass:
//   thread t: row t / kThreadsPerRow + pass * kRowsPerPass,
//             chunk t % kThreadsPerRow + j * kThreadsPerRow
template <class Element, int kRows, int kDim, int kPaddedDim, int kNumThreads, Access kAccess>
struct TileCopy {
  static constexpr int kElementsPerChunk = 16 / sizeof(Element);
  static constexpr int kChunks = kPaddedDim / kElementsPerChunk;
  static constexpr int kFilledChunks = ceil_div(kDim, kElementsPerChunk);
  using Layout = Swizzle<kChunks>;
  static constexpr int kThreadsPerRow = Layout::kSpan;
  static constexpr int kRowsPerPass = kNumThreads / kThreadsPerRow;
  static constexpr int kPasses = ceil_div(kRows, kRowsPerPass);
  static constexpr int kChunksPerThread = ceil_div(kChunks, kThreadsPerRow);
  static constexpr bool kAllThreadsCopy = kRows % kRowsPerPass == 0;
  static_assert(kRowsPerPass % 8 == 0, "a thread's swizzle key must not change between passes");

  int row;             // of this thread in pass 0
  int chunk;           // of this thread at j = 0
  uint32_t s_offset;   // byte offset of (row, chunk) in the shared tile
  int64_t pass_bytes;  // bytes between the rows of two passes in global memory

  __device__ TileCopy(int thread_idx, int64_t row_stride)
      : row(thread_idx / kThreadsPerRow),
        chunk(thread_idx % kThreadsPerRow),
        s_offset(Layout::offset(row, chunk)),
        pass_bytes(kRowsPerPass * row_stride * static_cast<int64_t>(sizeof(Element))) {}

  // Returns the address of this thread's share of a tile; g_tile is the tile's first row.
  __device__ const char* share(const char* g_tile) const {
    return g_tile + row * (pass_bytes / kRowsPerPass) + chunk * 16;
  }

  // Zeros the padding columns, which no copy touches. Once per buffer; the caller synchronises.
  __device__ void zero_padding(uint32_t s_tile_addr) const {
    if constexpr (kFilledChunks < kChunks) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
        for (int j = 0; j < kChunksPerThread; ++j) {
          if (row_is_mine(pass) && chunk + j * kThreadsPerRow >= kFilledChunks) {
            ptx::st_shared_v4(s_addr(s_tile_addr, pass, j), Vec16{});
          }
        }
      }
    }
  }

  // Starts copying a tile whose rows all exist. g_share: share() of its first row.
  __device__ void load_full(uint32_t s_tile_addr, const char* g_share) const {
    copy<false>(s_tile_addr, g_share, kRows);
  }

  // Starts copying a tile with rows_valid rows and fills the other rows with zeros.
  __device__ void load_tail(uint32_t s_tile_addr, const char* g_share, int rows_valid) const {
    copy<true>(s_tile_addr, g_share, rows_valid);
  }

  // Returns the address of this thread's chunk in the row at g_row.
  __device__ const char* lane(const char* g_row) const { return g_row + chunk * 16; }

  // Starts copying rows at any addresses: row_offset(skip) gives the bytes from g_lane, a lane()
  // pointer, to the row `skip` rows after this thread's first. With kTail, only rows_valid rows
  // exist; the others become zeros.
  template <bool kTail, bool kGrouped, class RowOffset>
  __device__ void load_rows(uint32_t s_tile_addr, const char* g_lane, int rows_valid,
                            RowOffset row_offset) const {
    // Several offsets at a time: if they come from shared memory, its latency is paid once.
    constexpr int kGroup = kGrouped ? kPasses : 1;
#pragma unroll
    for (int first = 0; first < kPasses; first += kGroup) {
      int64_t offsets[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        offsets[i] = row_is_mine(first + i) ? row_offset((first + i) * kRowsPerPass) : 0;
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        copy_row<kTail>(s_tile_addr, g_lane + offsets[i], first + i, rows_valid);
    }
  }

  // Flips the sign of every element that this thread copied (and that has arrived).
  __device__ void negate(uint32_t s_tile_addr) const {
    constexpr uint32_t kSignBits = sizeof(Element) == 4 ? 0x80000000u : 0x80008000u;
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll 1
      for (int j = 0; j < kChunksPerThread; ++j) {
        if (!row_is_mine(pass) || !chunk_is_filled(j)) continue;
        Vec16 v = ptx::ld_shared_v4(s_addr(s_tile_addr, pass, j));
#pragma unroll
        for (int i = 0; i < 4; ++i) v.word[i] ^= kSignBits;
        ptx::st_shared_v4(s_addr(s_tile_addr, pass, j), v);
      }
    }
  }

 private:
  template <bool kTail>
  __device__ void copy_row(uint32_t s_tile_addr, const char* g_lane, int pass,
                           int rows_valid) const {
    if (!row_is_mine(pass)) return;
    const bool exists = !kTail || row + pass * kRowsPerPass < rows_valid;
#pragma unroll
    for (int j = 0; j < kChunksPerThread; ++j) {
      if (!chunk_is_filled(j)) continue;
      copy_chunk<kTail>(s_addr(s_tile_addr, pass, j), g_lane + j * kThreadsPerRow * 16, j, exists);
    }
  }

  template <bool kTail>
  __device__ void copy(uint32_t s_tile_addr, const char* g_row, int rows_valid) const {
    // NOTE: the pointer walks from pass to pass. Offsets for each pass would be hoisted out of the
    // main loop, where they cost two registers, which then spill.
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass, g_row += pass_bytes) {
      const bool exists = !kTail || row + pass * kRowsPerPass < rows_valid;
#pragma unroll
      for (int j = 0; j < kChunksPerThread; ++j) {
        if (!row_is_mine(pass) || !chunk_is_filled(j)) continue;
        copy_chunk<kTail>(s_addr(s_tile_addr, pass, j), g_row + j * kThreadsPerRow * 16, j, exists);
      }
    }
  }

  // Copies one chunk; g_chunk is not read if the chunk does not exist.
  template <bool kTail>
  __device__ void copy_chunk(uint32_t s_chunk_addr, const char* g_chunk, int j, bool exists) const {
    if constexpr (kAccess == Access::kVec16) {
      if constexpr (kTail) {
        ptx::cp_async_16B_zfill(s_chunk_addr, g_chunk, exists ? 16 : 0);
      } else {
        ptx::cp_async_16B(s_chunk_addr, g_chunk);
      }
    } else {
      const int columns = kDim - (chunk + j * kThreadsPerRow) * kElementsPerChunk;
      ptx::st_shared_v4(s_chunk_addr,
                        gather(reinterpret_cast<const Element*>(g_chunk), exists ? columns : 0));
    }
  }

  // Returns the first `columns` elements at g_chunk, followed by zeros.
  __device__ static Vec16 gather(const Element* g_chunk, int columns) {
    union {
      Vec16 vec;
      Element element[kElementsPerChunk];
    } result;
#pragma unroll
    for (int i = 0; i < kElementsPerChunk; ++i) {
      result.element[i] = i < columns ? g_chunk[i] : Element(0);
    }
    return result.vec;
  }

  __device__ bool row_is_mine(int pass) const {
    return kAllThreadsCopy || row + pass * kRowsPerPass < kRows;
  }

  // Whether chunk j of this thread holds data; false for padding columns.
  __device__ bool chunk_is_filled(int j) const {
    if ((j + 1) * kThreadsPerRow <= kFilledChunks) return true;
    return chunk + j * kThreadsPerRow < kFilledChunks;
  }

  __device__ uint32_t s_addr(uint32_t s_tile_addr, int pass, int j) const {
    return s_tile_addr + s_offset + pass * kRowsPerPass * Layout::kRowBytes +
           j * kThreadsPerRow * 16;
  }
};

}  // namespace jitattn

// Tiles of a [Lq, Lkv] matrix (a bias or a mask), staged through shared memory.
//
// Rows are padded by 32 bytes (4-byte elements) or 16, so that the column pairs that a warp reads,
// 8 rows by 4 lanes, lie in different banks.
#pragma once

#include "jitattn/ptx/cp_async.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <class T, int kRows, int kBlockKv>
struct StagedMatrix {
  static constexpr int kRowBytes = kBlockKv * sizeof(T);
  static constexpr int kPitch = kRowBytes + (sizeof(T) == 4 ? 32 : 16);
  static constexpr int kBytes = kRows * kPitch;
  static constexpr int kChunks = kRowBytes / 16;  // per row
  static constexpr int kPerChunk = 16 / sizeof(T);
  static_assert(kRowBytes % 16 == 0);

  // Starts copying a tile with all of Threads (tile/threads.cuh): row_at(row) is the matrix row of
  // row `row` of the tile, key_at(column) the key of a column. Keys from len_kv on are not read and
  // become zeros.
  template <class Threads, class RowAt, class KeyAt>
  __device__ static void load(uint32_t s_tile_addr, int len_kv, RowAt row_at, KeyAt key_at) {
    constexpr int kItems = kRows * kChunks;
#pragma unroll 4
    for (int first = 0; first < kItems; first += Threads::kNumThreads) {
      const int item = first + Threads::idx();
      if (kItems % Threads::kNumThreads != 0 && item >= kItems) return;
      const int row = item / kChunks, chunk = item % kChunks;
      const int key = key_at(chunk * kPerChunk);
      const int exist = max_of(0, min_of(kPerChunk, len_kv - key));
      const T* g_row = row_at(row);
      ptx::cp_async_16B_zfill(s_tile_addr + row * kPitch + chunk * 16,
                              g_row + (exist > 0 ? key : 0), exist * sizeof(T));
    }
  }
};

}  // namespace jitattn

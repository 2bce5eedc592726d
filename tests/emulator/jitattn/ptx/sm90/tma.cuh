// A tensor map as tests/support/emulator.py encodes it.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

struct alignas(64) TensorMap {
  const unsigned char* address;
  uint64_t extents[5];  // innermost first, in elements of 2 bytes
  uint64_t strides[4];  // of all dimensions but the innermost, in bytes
  uint16_t box[5];
  unsigned char unused[38];

  uint32_t box_rows() const { return box[1] * box[2] * box[3] * box[4]; }
};
static_assert(sizeof(TensorMap) == 128);

inline void prefetch_tensor_map(const TensorMap&) {}

// Copies a box, with zeros where it leaves the tensor, swizzled: bits 4 to 6 of an address in shared
// memory are changed by bits 7 to 9.
inline void copy_box(uint32_t s_box, const TensorMap& map, const int (&first)[5]) {
  for (uint32_t i = 0; i < map.box_rows(); ++i) {
    const unsigned char* g_row = map.address;
    bool exists = true;
    for (uint32_t dimension = 1, left = i; dimension < 5; ++dimension) {
      const int64_t idx = first[dimension] + static_cast<int64_t>(left % map.box[dimension]);
      left /= map.box[dimension];
      exists &= idx >= 0 && static_cast<uint64_t>(idx) < map.extents[dimension];
      g_row += idx * static_cast<int64_t>(map.strides[dimension - 1]);
    }
    for (int column = 0; column < map.box[0]; column += 8) {
      const int64_t begin = first[0] + column;
      const int64_t left = static_cast<int64_t>(map.extents[0]) - begin;
      const int count = exists ? static_cast<int>(std::clamp<int64_t>(left, 0, 8)) : 0;
      unsigned char chunk[16] = {};
      if (count > 0) {
        emulator::watch(g_row + begin * 2, count * 2, emulator::Access::kRead);
        std::memcpy(chunk, g_row + begin * 2, count * 2);
      }
      const uint32_t s_chunk = s_box + i * map.box[0] * 2 + column * 2;
      unsigned char* to = emulator::at_shared(s_chunk ^ (s_chunk >> 7 & 7) << 4, 16);
      emulator::watch(to, 16, emulator::Access::kWrite);
      std::memcpy(to, chunk, 16);
    }
  }
}

inline void tma_load_packed(uint32_t s_box, const TensorMap& map, uint32_t s_barrier, int column,
                            int head, int row, int kv_head, int batch) {
  const emulator::AtWork at_work;
  if (s_box % 128) emulator::fail("the destination of a TMA copy is not aligned");
  emulator::start_bulk_copy(s_barrier, map.box_rows() * map.box[0] * 2u,
                            [=] { copy_box(s_box, map, {column, head, row, kv_head, batch}); });
}

// Of a map with four dimensions: the fifth has one index.
inline void tma_load(uint32_t s_box, const TensorMap& map, uint32_t s_barrier, int column, int row,
                     int head, int batch) {
  tma_load_packed(s_box, map, s_barrier, column, row, head, batch, 0);
}

inline void fence_proxy_async() {}

}  // namespace jitattn::ptx

#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

inline uint32_t shared_addr(const void* generic) {
  const auto* address = static_cast<const unsigned char*>(generic);
  if (address < s_storage || address >= s_storage + emulator::kLargestShared) {
    emulator::fail("this is no address of dynamic shared memory");
  }
  return static_cast<uint32_t>(address - s_storage);
}

inline uint32_t ld_shared_b32(uint32_t addr) { return emulator::load_shared<uint32_t>(addr); }
inline Vec16 ld_shared_v4(uint32_t addr) { return emulator::load_shared<Vec16>(addr); }
inline int64_t ld_shared_b64(uint32_t addr) { return emulator::load_shared<int64_t>(addr); }
inline float ld_shared_f32(uint32_t addr) { return emulator::load_shared<float>(addr); }

inline void st_shared_b64(uint32_t addr, int64_t value) { emulator::store_shared(addr, value); }
inline void st_shared_v2_b64(uint32_t addr, int64_t first, int64_t second) {
  emulator::at_shared(addr, 16);
  emulator::store_shared(addr, first);
  emulator::store_shared(addr + 8, second);
}
inline void st_shared_b32(uint32_t addr, uint32_t value) { emulator::store_shared(addr, value); }
inline void st_shared_v4(uint32_t addr, const Vec16& v) { emulator::store_shared(addr, v); }

template <int kNumThreads>
void barrier_sync() {
  if (kNumThreads != static_cast<int>(emulator::cta.threads.size())) {
    emulator::fail("a barrier is not for all threads");
  }
  __syncthreads();
}

}  // namespace jitattn::ptx

#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

inline void cp_async_16B_zfill(uint32_t dst_addr, const void* src, uint32_t src_bytes) {
  if (src_bytes > 0 && reinterpret_cast<uintptr_t>(src) % 16) {
    emulator::fail("the source of a cp.async is not aligned");
  }
  const emulator::AtWork at_work;
  // All 16 bytes count as read even if fewer are requested, as in compute-sanitizer.
  if (src_bytes > 0) emulator::watch(src, 16, emulator::Access::kRead);
  emulator::start_copy({emulator::at_shared(dst_addr, 16), static_cast<const unsigned char*>(src),
                        static_cast<int>(src_bytes)});
}

inline void cp_async_16B(uint32_t dst_addr, const void* src) {
  cp_async_16B_zfill(dst_addr, src, 16);
}

inline void cp_async_commit() { emulator::commit(); }

template <int kPending>
void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}

}  // namespace jitattn::ptx

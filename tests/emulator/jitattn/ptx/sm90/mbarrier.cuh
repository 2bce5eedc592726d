#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

inline void mbarrier_init(uint32_t s_barrier, uint32_t num_arrivals) {
  emulator::at_shared(s_barrier, 8);
  emulator::init_mbarrier(s_barrier, static_cast<int>(num_arrivals));
}
inline void mbarrier_init_fence() {}

inline void mbarrier_arrive(uint32_t s_barrier) { emulator::arrive_at_mbarrier(s_barrier, 0); }
inline void mbarrier_arrive_expect(uint32_t s_barrier, uint32_t num_bytes) {
  emulator::arrive_at_mbarrier(s_barrier, num_bytes);
}

inline void mbarrier_wait(uint32_t s_barrier, uint32_t parity) {
  emulator::wait_at_mbarrier(s_barrier, parity);
}

}  // namespace jitattn::ptx

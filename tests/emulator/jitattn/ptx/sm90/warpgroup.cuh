#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void acquire_registers() {}

inline void named_barrier_sync(int idx, int num_threads) {
  emulator::wait_at(emulator::named_barrier(idx, num_threads));
}
inline void named_barrier_arrive(int idx, int num_threads) {
  emulator::arrive_at(emulator::named_barrier(idx, num_threads));
}

}  // namespace jitattn::ptx

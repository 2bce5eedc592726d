#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// Lane i gives the address of row i % 8 of matrix i / 8.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  const auto* slots = emulator::exchange(addr);
  const int lane = emulated_lane();
  for (int m = 0; m < 4; ++m) {
    const uint32_t row = emulator::shown<uint32_t>(slots, m * 8 + lane / 4);
    emulator::at_shared(row, 16);
    r[m] = emulator::load_shared<uint32_t>(row + lane % 4 * 4);
  }
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  const auto* slots = emulator::exchange(addr);
  const int lane = emulated_lane();
  for (int m = 0; m < 4; ++m) {
    r[m] = 0;
    for (int i = 0; i < 2; ++i) {
      const uint32_t row = emulator::shown<uint32_t>(slots, m * 8 + lane % 4 * 2 + i);
      emulator::at_shared(row, 16);
      r[m] |= static_cast<uint32_t>(emulator::load_shared<uint16_t>(row + lane / 4 * 2)) << 16 * i;
    }
  }
}

}  // namespace jitattn::ptx

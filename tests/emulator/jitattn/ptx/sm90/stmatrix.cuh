#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// A lane has two neighbours of row lane / 4 of each matrix.
inline void stmatrix_x4(uint32_t s_row, const uint32_t (&matrix)[4]) {
  const auto* slots = emulator::exchange(s_row);
  const int lane = emulated_lane();
  for (int i = 0; i < 4; ++i) {
    const auto s_to = emulator::shown<uint32_t>(slots, i * 8 + lane / 4);
    emulator::at_shared(s_to, 16);
    emulator::store_shared(s_to + lane % 4 * 4, matrix[i]);
  }
}

}  // namespace jitattn::ptx

#pragma once

#include "jitattn/ptx/sm90/wgmma.cuh"

namespace jitattn::ptx {

template <bool kIsBf16, int kColumns, bool kAdds>
void wgmma_transposed(float (&d)[kColumns / 2], uint64_t a_desc, uint64_t b_desc) {
  static_assert(kColumns % 16 == 0 && kColumns <= 64);
  const emulator::AtWork at_work;
  emulator::start_product([&d, a_desc, b_desc] {
    const DescribedMatrix a(a_desc), b(b_desc);
    const int lane = emulated_lane(), first_row = emulator::cta.current / 32 % 4 * 16;
    if (lane == 0) {
      a.watch(16, 128);
      b.watch(16, kColumns * 2);
    }
    float rows[2][16];
    for (int half = 0; half < 2; ++half) {
      a.column<kIsBf16>(rows[half], first_row + lane / 4 + half * 8);
    }
    add_products<kColumns>(d, rows, kAdds, [&](float (&numbers)[16], int column) {
      b.column<kIsBf16>(numbers, column);
    });
  });
}

}  // namespace jitattn::ptx

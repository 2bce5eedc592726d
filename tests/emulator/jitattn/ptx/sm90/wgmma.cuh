// D = A B + C of a warpgroup. Sums are computed in fp64 and rounded once per instruction. Products
// are computed when they are issued, or when they are waited for.
#pragma once

#include "jitattn/ptx/math.cuh"
#include "jitattn/types.cuh"

namespace jitattn::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit_products(); }
template <int kPending>
void wgmma_wait() {
  emulator::wait_for_products(kPending);
}
template <int kCount>
void wgmma_hold(float (&)[kCount]) {}
template <int kSteps>
void wgmma_hold(uint32_t (&)[kSteps][4]) {}

inline void wgmma_results_are_dropped(bool dropped) {
  const emulator::AtWork at_work;
  emulator::self().drops_products = dropped;
}

template <bool kIsBf16>
float to_float(uint16_t bits) {
  if constexpr (kIsBf16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return f16_to_f32(bits);
}

// A matrix in shared memory with 128-byte swizzle, or without any, by its descriptor.
struct DescribedMatrix {
  uint32_t s_addr, lead, eight_rows;
  bool is_swizzled;

  explicit DescribedMatrix(uint64_t desc)
      : s_addr(static_cast<uint32_t>(desc & 0x3fff) << 4),
        lead(static_cast<uint32_t>(desc >> 16 & 0x3fff) << 4),
        eight_rows(static_cast<uint32_t>(desc >> 32 & 0x3fff) << 4),
        is_swizzled(desc >> 62 == 1) {
    if (desc >> 62 > 1) emulator::fail("a matrix descriptor is of another swizzle");
  }

  // Numbers that are summed over: 16 of a row of a matrix [rows, columns summed over], ...
  template <bool kIsBf16>
  void row(float (&numbers)[16], uint32_t row) const {
    for (uint32_t chunk = 0; chunk < 2; ++chunk) {
      const uint32_t bytes = is_swizzled ? row % 8 * 128 + chunk * 16 : row % 8 * 16 + chunk * lead;
      uint16_t bits[8];
      std::memcpy(bits, at(row, bytes, 16), 16);
      for (int i = 0; i < 8; ++i) numbers[chunk * 8 + i] = to_float<kIsBf16>(bits[i]);
    }
  }
  // ... and 16 of a column of one [rows summed over, columns].
  template <bool kIsBf16>
  void column(float (&numbers)[16], uint32_t column) const {
    for (uint32_t k = 0; k < 16; ++k) {
      uint16_t bits;
      std::memcpy(&bits, at(k, k % 8 * 128 + column % 64 * 2 + column / 64 * lead, 2), 2);
      numbers[k] = to_float<kIsBf16>(bits);
    }
  }

  void watch(int num_rows, int num_bytes) const {
    if (!is_swizzled) return watch_plain(num_rows);
    for (int row = 0; row < num_rows; ++row) {
      for (int byte = 0; byte < num_bytes; byte += 16) {
        const uint32_t begin = byte % 128 + byte / 128 * lead;
        const uint32_t addr = s_addr + row / 8 * eight_rows + row % 8 * 128 + begin;
        emulator::watch(emulator::at_shared(addr ^ (addr >> 7 & 7) << 4, 16), 16,
                        emulator::Access::kRead);
      }
    }
  }

 private:
  // Bytes behind the first of eight rows, which lie in the order of a swizzle if there is one.
  const unsigned char* at(uint32_t row, uint32_t bytes, int num_bytes) const {
    const uint32_t addr = s_addr + row / 8 * eight_rows + bytes;
    return emulator::at_shared(is_swizzled ? addr ^ (addr >> 7 & 7) << 4 : addr, num_bytes);
  }

  void watch_plain(int num_rows) const {
    for (int chunk = 0; chunk < num_rows * 2; ++chunk) {
      const uint32_t row = chunk / 2, addr = s_addr + row / 8 * eight_rows + row % 8 * 16;
      emulator::watch(emulator::at_shared(addr + chunk % 2 * lead, 16), 16,
                      emulator::Access::kRead);
    }
  }
};

// Adds to this lane's accumulators: number 4 n + 2 half + i is at row lane / 4 + 8 half of the warp
// and at column 8 n + lane % 4 * 2 + i. b_column(numbers, column) gives the other operand.
template <int kColumns, class Column>
void add_products(float (&d)[kColumns / 2], const float (&a)[2][16], bool adds, Column b_column) {
  for (int n = 0; n < kColumns / 8; ++n) {
    for (int i = 0; i < 2; ++i) {
      float b[16];
      b_column(b, n * 8 + emulated_lane() % 4 * 2 + i);
      for (int half = 0; half < 2; ++half) {
        float& sum = d[n * 4 + half * 2 + i];
        double exact = adds ? sum : 0.0;
        for (int k = 0; k < 16; ++k) exact += static_cast<double>(a[half][k]) * b[k];
        sum = static_cast<float>(exact);
      }
    }
  }
}

template <bool kIsBf16, int kColumns, bool kAdds>
void wgmma_rows(float (&d)[kColumns / 2], uint64_t a_desc, uint64_t b_desc) {
  static_assert(kColumns % 16 == 0 && kColumns <= 256);
  const emulator::AtWork at_work;
  const bool is_dropped = emulator::self().drops_products;
  emulator::start_product([&d, a_desc, b_desc, is_dropped] {
    const DescribedMatrix a(a_desc), b(b_desc);
    const int lane = emulated_lane(), first_row = emulator::cta.current / 32 % 4 * 16;
    if (lane == 0 && !is_dropped) {
      a.watch(64, 32);
      b.watch(kColumns, 32);
    }
    float rows[2][16];
    for (int half = 0; half < 2; ++half)
      a.row<kIsBf16>(rows[half], first_row + lane / 4 + half * 8);
    add_products<kColumns>(
        d, rows, kAdds, [&](float (&numbers)[16], int column) { b.row<kIsBf16>(numbers, column); });
  });
}

template <bool kIsBf16, int kColumns>
void wgmma_columns(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b_desc) {
  static_assert(kColumns % 16 == 0 && kColumns <= 256);
  const emulator::AtWork at_work;
  const bool is_dropped = emulator::self().drops_products;
  emulator::start_product([&d, &a, b_desc, is_dropped] {
    const DescribedMatrix b(b_desc);
    struct Words {
      uint32_t of[4];
    };
    const auto* slots = emulator::exchange(Words{{a[0], a[1], a[2], a[3]}});
    const int lane = emulated_lane();
    if (lane == 0 && !is_dropped) b.watch(16, kColumns * 2);
    float rows[2][16];
    for (int word = 0; word < 4; ++word) {
      const auto shown = emulator::shown<Words>(slots, lane / 4 * 4 + word);
      for (int i = 0; i < 4; ++i) {  // rows below, and columns from 8 on
        for (int part = 0; part < 2; ++part) {
          const auto bits = static_cast<uint16_t>(shown.of[i] >> 16 * part);
          rows[i % 2][i / 2 * 8 + word * 2 + part] = to_float<kIsBf16>(bits);
        }
      }
    }
    add_products<kColumns>(d, rows, true, [&](float (&numbers)[16], int column) {
      b.column<kIsBf16>(numbers, column);
    });
  });
}

}  // namespace jitattn::ptx

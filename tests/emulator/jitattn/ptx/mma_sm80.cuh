// D = A B + C of one warp. Sums are computed in fp64 and rounded once, whereas tensor cores
// truncate.
#pragma once

#include "jitattn/ptx/math.cuh"
#include "jitattn/types.cuh"

namespace jitattn::ptx {

struct Operands {
  uint32_t a[4];
  uint32_t b[2];
};

// The words of four neighbouring lanes hold a row of A or a column of B; a[1] and a[3] are 8 rows
// further down, a[2], a[3] and b[1] in the second half of K. dot(row word, column word) sums the
// products of the elements of a word; accumulator i is at row lane / 4 + i / 2 * 8 and column
// lane % 4 * 2 + i % 2.
template <class Sum, class Dot>
inline void products(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Dot dot) {
  const auto* slots = emulator::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = emulated_lane();
  for (int word = 0; word < 4; ++word) {
    const auto row = emulator::shown<Operands>(slots, lane / 4 * 4 + word);
    for (int column = 0; column < 2; ++column) {
      const auto other = emulator::shown<Operands>(slots, (lane % 4 * 2 + column) * 4 + word);
      for (int half = 0; half < 2; ++half) {
        sum[half * 2 + column] += dot(row.a[half], other.b[0]) + dot(row.a[2 + half], other.b[1]);
      }
    }
  }
}

template <class ToFloat>
inline double dot_of_halves(uint32_t x, uint32_t y, ToFloat to_float) {
  double sum = 0.0;
  for (int i = 0; i < 2; ++i) {
    sum += static_cast<double>(to_float(static_cast<uint16_t>(x >> 16 * i))) *
           to_float(static_cast<uint16_t>(y >> 16 * i));
  }
  return sum;
}

inline double dot_f16(uint32_t x, uint32_t y) { return dot_of_halves(x, y, f16_to_f32); }
inline double dot_bf16(uint32_t x, uint32_t y) {
  return dot_of_halves(
      x, y, [](uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); });
}
inline double dot_tf32(uint32_t x, uint32_t y) {
  return static_cast<double>(__uint_as_float(x & 0xffffe000u)) * __uint_as_float(y & 0xffffe000u);
}
inline int32_t dot_s8(uint32_t x, uint32_t y) {
  int32_t sum = 0;
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(x >> 8 * i) * static_cast<int8_t>(y >> 8 * i);
  }
  return sum;
}

template <class Dot>
inline void mma_float(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Dot dot) {
  double sum[4] = {c[0], c[1], c[2], c[3]};
  products(sum, a, b, dot);
  for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(sum[i]);
}

inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_float(c, a, b, dot_f16);
}

inline void mma_m16n8k16_f16_f16(uint32_t (&c)[2], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  double sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = f16_to_f32(static_cast<uint16_t>(c[i / 2] >> i % 2 * 16));
  products(sum, a, b, dot_f16);
  for (int i = 0; i < 2; ++i) {
    c[i] = pack_f16x2(static_cast<float>(sum[2 * i]), static_cast<float>(sum[2 * i + 1]));
  }
}

inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_float(c, a, b, dot_bf16);
}

inline void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  products(c, a, b, dot_s8);
}

inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            int32_t first) {
  for (int32_t& sum : d) sum = first;
  products(d, a, b, dot_s8);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_float(c, a, b, dot_tf32);
}

}  // namespace jitattn::ptx

// D = A B + C of one warp. Sums are computed in fp64 (of int8 in int32) and rounded once, whereas
// tensor cores truncate.
#pragma once

#include "jitattn/ptx/math.cuh"
#include "jitattn/types.cuh"

#pragma GCC push_options
#pragma GCC optimize("O3")

namespace jitattn::ptx {

// Words of A and B as a lane has them, taken apart into kPerWord numbers each.
template <class Number, int kPerWord>
struct Operands {
  Number a[4][kPerWord];
  Number b[2][kPerWord];
};

// Adds rows of A times columns of B. The words of four neighbouring lanes hold a row of A or a column
// of B; a[1] and a[3] are 8 rows further down, a[2], a[3] and b[1] in the second half of K.
// Accumulator i is at row lane / 4 + i / 2 * 8 and column lane % 4 * 2 + i % 2. Each lane takes its
// own words apart, with numbers(words of the result, word), before others read them.
template <class Number, int kPerWord, class Sum, class Numbers>
__attribute__((always_inline)) inline void products(Sum (&sum)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2], Numbers numbers) {
  using Mine = Operands<Number, kPerWord>;
  constexpr int kDepth = 8 * kPerWord;
  Mine mine;
  for (int i = 0; i < 4; ++i) numbers(mine.a[i], a[i]);
  for (int i = 0; i < 2; ++i) numbers(mine.b[i], b[i]);
  const auto* slots = emulator::exchange(mine);
  const int lane = emulated_lane();
  Sum rows[2][kDepth], columns[2][kDepth];
  for (int word = 0; word < 4; ++word) {
    const auto row = emulator::shown<Mine>(slots, lane / 4 * 4 + word);
    for (int i = 0; i < 2 * kPerWord; ++i) {
      for (int half = 0; half < 2; ++half) {
        rows[half][word * 2 * kPerWord + i] = row.a[half + i / kPerWord * 2][i % kPerWord];
      }
    }
    for (int column = 0; column < 2; ++column) {
      const auto other = emulator::shown<Mine>(slots, (lane % 4 * 2 + column) * 4 + word);
      for (int i = 0; i < 2 * kPerWord; ++i) {
        columns[column][word * 2 * kPerWord + i] = other.b[i / kPerWord][i % kPerWord];
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < kDepth; ++k) sum[i] += rows[i / 2][k] * columns[i % 2][k];
  }
}

struct F16 {
  void operator()(float (&of)[2], uint32_t word) const {
    for (int i = 0; i < 2; ++i) of[i] = f16_to_f32(static_cast<uint16_t>(word >> 16 * i));
  }
};
struct Bf16 {
  void operator()(float (&of)[2], uint32_t word) const {
    of[0] = __uint_as_float(word << 16);
    of[1] = __uint_as_float(word & 0xffff0000u);
  }
};
struct Tf32 {
  void operator()(float (&of)[1], uint32_t word) const {
    of[0] = __uint_as_float(word & 0xffffe000u);
  }
};
struct S8 {
  void operator()(int8_t (&of)[4], uint32_t word) const {
    for (int i = 0; i < 4; ++i) of[i] = static_cast<int8_t>(word >> 8 * i);
  }
};

template <int kPerWord, class Numbers>
inline void mma_float(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      Numbers numbers) {
  double sum[4] = {c[0], c[1], c[2], c[3]};
  products<float, kPerWord>(sum, a, b, numbers);
  for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(sum[i]);
}

inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_float<2>(c, a, b, F16());
}

inline void mma_m16n8k16_f16_f16(uint32_t (&c)[2], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  double sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = f16_to_f32(static_cast<uint16_t>(c[i / 2] >> i % 2 * 16));
  products<float, 2>(sum, a, b, F16());
  for (int i = 0; i < 2; ++i) {
    c[i] = pack_f16x2(static_cast<float>(sum[2 * i]), static_cast<float>(sum[2 * i + 1]));
  }
}

inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_float<2>(c, a, b, Bf16());
}

inline void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  products<int8_t, 4>(c, a, b, S8());
}

inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            int32_t first) {
  for (int32_t& sum : d) sum = first;
  mma_m16n8k32_s8(d, a, b);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_float<1>(c, a, b, Tf32());
}

}  // namespace jitattn::ptx

#pragma GCC pop_options

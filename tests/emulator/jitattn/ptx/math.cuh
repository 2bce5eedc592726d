#pragma once

#include <immintrin.h>

#include "jitattn/types.cuh"

namespace jitattn::ptx {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1.f / x; }
inline float sin_approx(float x) { return std::sin(x); }
inline float cos_approx(float x) { return std::cos(x); }

inline float min_or_nan(float x, float y) { return x != x || x < y ? x : y; }

inline float f16_to_f32(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t f32_to_f16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

inline uint16_t f32_to_bf16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t pack_f16x2(float low, float high) {
  return f32_to_f16(low) | static_cast<uint32_t>(f32_to_f16(high)) << 16;
}

// Applies an operation to pairs of fp16 element by element; rounds to fp32, then to fp16.
template <class Operation>
inline uint32_t of_halves(uint32_t x, uint32_t y, uint32_t z, Operation operation) {
  float result[2];
  for (int i = 0; i < 2; ++i) {
    auto part = [i](uint32_t pair) {
      return static_cast<double>(f16_to_f32(static_cast<uint16_t>(pair >> 16 * i)));
    };
    result[i] = static_cast<float>(operation(part(x), part(y), part(z)));
  }
  return pack_f16x2(result[0], result[1]);
}

inline uint32_t mul_f16x2(uint32_t x, uint32_t y) {
  return of_halves(x, y, 0, [](double a, double b, double) { return a * b; });
}

inline uint32_t fma_f16x2(uint32_t x, uint32_t y, uint32_t z) {
  return of_halves(x, y, z, [](double a, double b, double c) { return a * b + c; });
}

inline uint32_t pack_bf16x2(float low, float high) {
  return f32_to_bf16(low) | static_cast<uint32_t>(f32_to_bf16(high)) << 16;
}

inline uint32_t cvt_s8(float x) {
  const float rounded = std::nearbyint(x);
  return static_cast<int32_t>(x != x ? 0.f : std::min(127.f, std::max(-128.f, rounded)));
}

// Rounds to a 10-bit mantissa, to nearest, ties away from zero.
inline uint32_t cvt_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits >> 23 & 0xff) == 0xff) return bits;
  return (bits + 0x1000) & 0xffffe000u;
}

}  // namespace jitattn::ptx

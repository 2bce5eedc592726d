// Fixed-width integer names without toolkit headers, and small helpers for every file.
#pragma once

namespace jitattn {

using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

// Four 32-bit words, moved by one 16-byte access.
struct alignas(16) Vec16 {
  uint32_t word[4];
};

template <bool kCondition, class A, class B>
struct Conditional {
  using type = A;
};
template <class A, class B>
struct Conditional<false, A, B> {
  using type = B;
};

constexpr float kLn2 = 0.693147180559945309f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

struct Division {
  int64_t quotient;
  int64_t rest;
};

// Divides in 32 bits if that suffices, which takes a fifth of the instructions. number >= 0.
__device__ __forceinline__ Division divide(int64_t number, int32_t divisor) {
  if (number >> 32 != 0) return {number / divisor, number % divisor};
  const uint32_t low = static_cast<uint32_t>(number), by = static_cast<uint32_t>(divisor);
  return {low / by, low % by};
}

// Returns n / divisor for 0 <= n < 2^31 (jitattn/spec/arguments.py: fast_divisor).
__device__ __forceinline__ int divide(int n, uint32_t mul, uint32_t shift) {
  const uint32_t dividend = n;
  return static_cast<int>((__umulhi(dividend, mul) + dividend) >> shift);
}

// Returns the base-2 logarithm of a power of two.
__host__ __device__ constexpr int log2_of(int number) {
  return number <= 1 ? 0 : 1 + log2_of(number / 2);
}

template <class T>
__host__ __device__ constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
__host__ __device__ constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}

}  // namespace jitattn

// Division by a number that is an argument, in traced functions: the host gives a multiplier and a
// shift (jitattn/spec/arguments.py: signed_divisor), so that a quotient takes eight instructions and
// no branch, whatever the signs.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::fn {

// A number and the division by its magnitude. If it is 0, quotients are 0 or -1.
struct Divisor {
  int number;
  uint32_t mul, shift;

  // Returns n / magnitude for 0 <= n <= 2^31.
  __device__ __forceinline__ uint32_t of_magnitudes(uint32_t n) const {
    return (__umulhi(n, mul) + n) >> shift;
  }
};

// Rounded down: of n < 0, it is ~(~n / d); a negative divisor divides -n.
__device__ __forceinline__ int floordiv(int x, const Divisor& by) {
  const int sign = by.number >> 31;
  const uint32_t less = static_cast<uint32_t>(x) + sign;  // ~-x, or x
  const uint32_t flips = x < -sign ? ~0u : 0u;            // whether -x is not negative, or x is
  return static_cast<int>(by.of_magnitudes(less ^ flips) ^ flips ^ sign);
}
__device__ __forceinline__ int truncdiv(int x, const Divisor& by) {
  const uint32_t magnitude = x < 0 ? 0u - static_cast<uint32_t>(x) : static_cast<uint32_t>(x);
  const uint32_t quotient = by.of_magnitudes(magnitude);
  return static_cast<int>((x ^ by.number) < 0 ? 0u - quotient : quotient);
}
__device__ __forceinline__ int rest_of(int x, int quotient, const Divisor& by) {
  return static_cast<int>(static_cast<uint32_t>(x) -
                          static_cast<uint32_t>(quotient) * static_cast<uint32_t>(by.number));
}
__device__ __forceinline__ int mod(int x, const Divisor& by) {
  return rest_of(x, floordiv(x, by), by);
}
__device__ __forceinline__ int fmod(int x, const Divisor& by) {
  return rest_of(x, truncdiv(x, by), by);
}

}  // namespace jitattn::fn

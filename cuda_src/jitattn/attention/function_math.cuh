// Operations of traced score and mask functions, as torch computes them: integers wrap, // and %
// round down, exponentials are accurate to a few units of fp32. Numbers of 16 bits are held as fp32,
// and small integers as int: to_f16, to_i8 … round and wrap them.
#pragma once

#include "jitattn/attention/function_divisor.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// What a function of pairs is told of one, in its sequence.
struct ScorePlace {
  int batch, head, row, key;
  int shift;  // Lkv - Lq
};

}  // namespace jitattn

namespace jitattn::fn {

// ---- Kinds
__device__ __forceinline__ float f16_of(uint32_t bits) {
  return ptx::f16_to_f32(static_cast<uint16_t>(bits));
}
__device__ __forceinline__ float bf16_of(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ bool to_b1(bool x) { return x; }
__device__ __forceinline__ bool to_b1(int x) { return x != 0; }
__device__ __forceinline__ bool to_b1(long long x) { return x != 0; }
__device__ __forceinline__ bool to_b1(float x) { return x != 0.f; }
template <class T>
__device__ __forceinline__ int to_i32(T x) {
  return static_cast<int>(x);
}
__device__ __forceinline__ int to_i32(float x) {
  return static_cast<int>(static_cast<long long>(x));
}
template <class T>
__device__ __forceinline__ long long to_i64(T x) {
  return static_cast<long long>(x);
}
template <class T>
__device__ __forceinline__ int to_u8(T x) {
  return to_i32(x) & 0xff;
}
template <class T>
__device__ __forceinline__ int to_i8(T x) {
  return static_cast<int>(static_cast<unsigned>(to_i32(x)) << 24) >> 24;
}
template <class T>
__device__ __forceinline__ int to_i16(T x) {
  return static_cast<int>(static_cast<unsigned>(to_i32(x)) << 16) >> 16;
}
template <class T>
__device__ __forceinline__ float to_f32(T x) {
  return static_cast<float>(x);
}
template <class T>
__device__ __forceinline__ float to_f16(T x) {
  return f16_of(ptx::pack_f16x2(to_f32(x), 0.f));
}
template <class T>
__device__ __forceinline__ float to_bf16(T x) {
  return bf16_of(ptx::pack_bf16x2(to_f32(x), 0.f));
}

// ---- Captured tensors
// Where an index lies: negative ones count from the end, others are bounded.
template <class T>
__device__ __forceinline__ long long place(T index, int size) {
  const T wrapped = index < 0 ? index + size : index;
  const T last = static_cast<T>(size - 1);
  return wrapped < 0 ? 0 : wrapped > last ? last : wrapped;
}
__device__ __forceinline__ bool load_b1(const uint8_t* g) { return __ldg(g) != 0; }
__device__ __forceinline__ int load_u8(const uint8_t* g) { return __ldg(g); }
__device__ __forceinline__ int load_i8(const signed char* g) { return __ldg(g); }
__device__ __forceinline__ int load_i16(const short* g) { return __ldg(g); }
__device__ __forceinline__ int load_i32(const int* g) { return __ldg(g); }
__device__ __forceinline__ long long load_i64(const long long* g) { return __ldg(g); }
__device__ __forceinline__ float load_f32(const float* g) { return __ldg(g); }
__device__ __forceinline__ float load_f64(const double* g) { return static_cast<float>(__ldg(g)); }
__device__ __forceinline__ float load_f16(const uint16_t* g) { return f16_of(__ldg(g)); }
__device__ __forceinline__ float load_bf16(const uint16_t* g) { return bf16_of(__ldg(g)); }

// ---- Comparisons
template <class T>
__device__ __forceinline__ bool is_lt(T x, T y) {
  return x < y;
}
template <class T>
__device__ __forceinline__ bool is_le(T x, T y) {
  return x <= y;
}
template <class T>
__device__ __forceinline__ bool is_gt(T x, T y) {
  return x > y;
}
template <class T>
__device__ __forceinline__ bool is_ge(T x, T y) {
  return x >= y;
}
template <class T>
__device__ __forceinline__ bool is_eq(T x, T y) {
  return x == y;
}
template <class T>
__device__ __forceinline__ bool is_ne(T x, T y) {
  return x != y;
}
__device__ __forceinline__ bool isnan(float x) { return x != x; }
__device__ __forceinline__ bool isinf(float x) { return fabsf(x) == infinity(); }

// ---- Logic and bits
template <class T>
__device__ __forceinline__ T bit_and(T x, T y) {
  return x & y;
}
template <class T>
__device__ __forceinline__ T bit_or(T x, T y) {
  return x | y;
}
template <class T>
__device__ __forceinline__ T bit_xor(T x, T y) {
  return x ^ y;
}
__device__ __forceinline__ bool bit_not(bool x) { return !x; }
template <class T>
__device__ __forceinline__ T bit_not(T x) {
  return ~x;
}
template <class T>
struct Unsigned {
  using type = uint32_t;
};
template <>
struct Unsigned<long long> {
  using type = uint64_t;
};
template <class T>
__device__ __forceinline__ T shl(T x, T y) {
  using U = typename Unsigned<T>::type;
  constexpr T kBits = sizeof(T) * 8;
  return y < 0 || y >= kBits ? 0 : static_cast<T>(static_cast<U>(x) << y);
}
template <class T>
__device__ __forceinline__ T shr(T x, T y) {
  constexpr T kLast = sizeof(T) * 8 - 1;
  return x >> (y < 0 || y > kLast ? kLast : y);
}

// ---- Integers: sums wrap, and nothing traps.
template <class T>
__device__ __forceinline__ T add(T x, T y) {
  using U = typename Unsigned<T>::type;
  return static_cast<T>(static_cast<U>(x) + static_cast<U>(y));
}
template <class T>
__device__ __forceinline__ T sub(T x, T y) {
  using U = typename Unsigned<T>::type;
  return static_cast<T>(static_cast<U>(x) - static_cast<U>(y));
}
template <class T>
__device__ __forceinline__ T mul(T x, T y) {
  using U = typename Unsigned<T>::type;
  return static_cast<T>(static_cast<U>(x) * static_cast<U>(y));
}
template <class T>
__device__ __forceinline__ T neg(T x) {
  return sub<T>(0, x);
}
template <class T>
__device__ __forceinline__ T truncdiv(T x, T y) {
  if (y == 0) return 0;
  return y == -1 ? neg(x) : x / y;
}
template <class T>
__device__ __forceinline__ T fmod(T x, T y) {
  return y == 0 || y == -1 ? 0 : x % y;
}
template <class T>
__device__ __forceinline__ T mod(T x, T y) {
  const T rest = fmod(x, y);
  return rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest;
}
template <class T>
__device__ __forceinline__ T floordiv(T x, T y) {
  const T quotient = truncdiv(x, y);
  return mul(quotient, y) != x && (x < 0) != (y < 0) ? quotient - 1 : quotient;
}
// By squaring; a negative exponent leaves 1 / x, rounded to zero.
template <class T>
__device__ __forceinline__ T pow(T x, T y) {
  if (y < 0) return x == 1 ? 1 : x == -1 ? (y % 2 == 0 ? 1 : -1) : 0;
  T product = 1;
#pragma unroll 1
  for (; y > 0; y >>= 1) {
    if (y & 1) product = mul(product, x);
    x = mul(x, x);
  }
  return product;
}
template <class T>
__device__ __forceinline__ T abs(T x) {
  return x < 0 ? neg(x) : x;
}
template <class T>
__device__ __forceinline__ T sign(T x) {
  return x > 0 ? 1 : x < 0 ? -1 : 0;
}
template <class T>
__device__ __forceinline__ T min(T x, T y) {
  return x < y ? x : y;
}
template <class T>
__device__ __forceinline__ T max(T x, T y) {
  return x > y ? x : y;
}

// ---- Floats. What takes many instructions is called: a kernel has a copy for each score of a
// thread, and compiles for half a minute.
__device__ __forceinline__ float add(float x, float y) { return x + y; }
__device__ __forceinline__ float sub(float x, float y) { return x - y; }
__device__ __forceinline__ float mul(float x, float y) { return x * y; }
__device__ __forceinline__ float neg(float x) { return -x; }
__device__ __forceinline__ float abs(float x) { return fabsf(x); }
__device__ __forceinline__ float sign(float x) {
  return isnan(x) ? x : x > 0.f ? 1.f : x < 0.f ? -1.f : 0.f;
}
// NaN if either is, as torch's.
__device__ __forceinline__ float min(float x, float y) { return ptx::min_or_nan(x, y); }
__device__ __forceinline__ float max(float x, float y) { return -ptx::min_or_nan(-x, -y); }
__device__ __forceinline__ float floor(float x) { return floorf(x); }
__device__ __forceinline__ float ceil(float x) { return ceilf(x); }
__device__ __forceinline__ float trunc(float x) { return truncf(x); }
__device__ __forceinline__ float round(float x) { return rintf(x); }
// A step of Newton's on an approximate quotient, but where that is no number.
__device__ __forceinline__ float div(float x, float y) {
  const float inverse = ptx::rcp_approx(y), quotient = x * inverse;
  const float refined = fmaf(fmaf(-quotient, y, x), inverse, quotient);
  return isnan(refined) ? quotient : refined;
}
__device__ __forceinline__ float truncdiv(float x, float y) { return truncf(div(x, y)); }
__device__ __noinline__ float fmod(float x, float y) { return fmodf(x, y); }
__device__ __forceinline__ float mod(float x, float y) {
  const float rest = fmod(x, y);
  return rest != 0.f && (rest < 0.f) != (y < 0.f) ? rest + y : rest;
}
__device__ __forceinline__ float floordiv(float x, float y) {
  const float rest = fmod(x, y), quotient = (x - rest) / y;
  const float below = rest != 0.f && (rest < 0.f) != (y < 0.f) ? quotient - 1.f : quotient;
  if (y == 0.f || below == 0.f) return y == 0.f ? x / y : below;
  const float whole = floorf(below);
  return below - whole > 0.5f ? whole + 1.f : whole;
}
__device__ __noinline__ float pow(float x, float y) { return powf(x, y); }
__device__ __noinline__ float atan2(float y, float x) { return atan2f(y, x); }
// 2^(x log2 e), where the rounding error of the product comes in as a factor.
__device__ __forceinline__ float exp(float x) {
  constexpr float kLog2e = 1.44269504f, kRest = 1.92596299e-8f;
  const float product = x * kLog2e;
  const float rest = fmaf(x, kLog2e, -product) + x * kRest;
  const float power = ptx::exp2_approx(product);
  const float exact = fmaf(power, rest * kLn2, power);
  return isnan(exact) ? power : exact;
}
__device__ __forceinline__ float exp2(float x) { return ptx::exp2_approx(x); }
__device__ __noinline__ float expm1(float x) { return expm1f(x); }
__device__ __forceinline__ float log(float x) { return ptx::log2_approx(x) * kLn2; }
__device__ __forceinline__ float log2(float x) { return ptx::log2_approx(x); }
__device__ __noinline__ float log1p(float x) { return log1pf(x); }
__device__ __forceinline__ float sqrt(float x) { return sqrtf(x); }
__device__ __forceinline__ float rsqrt(float x) { return div(1.f, sqrtf(x)); }
__device__ __forceinline__ float reciprocal(float x) { return div(1.f, x); }
// 1 - 2 / (e^2x + 1), with an error of about 1e-7, as softcap has it (score.cuh).
__device__ __forceinline__ float tanh(float x) {
  return fmaf(-2.f, ptx::rcp_approx(ptx::exp2_approx(x * 2.88539008f) + 1.f), 1.f);
}
__device__ __forceinline__ float sigmoid(float x) {
  return ptx::rcp_approx(1.f + ptx::exp2_approx(x * -1.44269504f));
}
// Less the nearest multiple of 2 pi, which has three parts.
__device__ __forceinline__ float turned(float x) {
  const float turns = rintf(x * 0.159154943f);
  return fmaf(turns, 6.8604980e-15f, fmaf(turns, 1.74845553e-7f, fmaf(turns, -6.28318548f, x)));
}
__device__ __forceinline__ float sin(float x) { return ptx::sin_approx(turned(x)); }
__device__ __forceinline__ float cos(float x) { return ptx::cos_approx(turned(x)); }
__device__ __noinline__ float tan(float x) { return tanf(x); }
__device__ __noinline__ float sinh(float x) { return sinhf(x); }
__device__ __noinline__ float cosh(float x) { return coshf(x); }
__device__ __noinline__ float atan(float x) { return atanf(x); }
__device__ __noinline__ float erf(float x) { return erff(x); }

}  // namespace jitattn::fn

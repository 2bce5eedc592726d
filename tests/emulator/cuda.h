// CUDA keywords and functions, as far as the templates use them, for a C++ compiler. Precompiled:
// parsing these headers takes most of the compile time of a small kernel.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __align__(bytes)  // ignored: shared memory is aligned below
#define __launch_bounds__(...)
#define __grid_constant__

struct EmulatedThreadIdx {
  struct X {
    operator int() const { return emulator::cta.current; }
  } x;
};
struct EmulatedBlockIdx {
  struct X {
    operator unsigned() const { return emulator::cta.idx; }
  } x;
};
struct EmulatedGridDim {
  struct X {
    operator unsigned() const { return emulator::cta.count; }
  } x;
};
inline constexpr EmulatedThreadIdx threadIdx;
inline constexpr EmulatedGridDim gridDim;
inline constexpr EmulatedBlockIdx blockIdx;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) emulator::fail("a load is not aligned");
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return __ldg(address);
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { emulator::fail("a device-side check failed"); }

// ---- Synchronisation. Masks name all lanes that have not exited, as in the templates.
inline void __syncthreads() { emulator::synchronize_cta(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::synchronize_warp(); }
inline int emulated_lane() { return emulator::cta.current % emulator::kWarpSize; }
template <class T>
T __shfl_sync(unsigned, T value, int lane, int = 32) {
  return emulator::shown<T>(emulator::exchange(value), lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return emulator::shown<T>(emulator::exchange(value), emulated_lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta, int = 32) {
  const int lane = emulated_lane();
  return emulator::shown<T>(emulator::exchange(value), lane < delta ? lane : lane - delta);
}
inline unsigned __ballot_sync(unsigned, int condition) {
  const auto* slots = emulator::exchange(condition);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (emulator::shown<int>(slots, lane) != 0) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int condition) { return __ballot_sync(mask, condition) != 0; }
inline int __all_sync(unsigned mask, int condition) {
  return __ballot_sync(mask, condition) == mask;
}
inline int __reduce_add_sync(unsigned, int value) {
  const auto* slots = emulator::exchange(value);
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += emulator::shown<int>(slots, lane);
  return sum;
}

template <class T>
T atomicAdd(T* address, T value) {
  const emulator::AtWork at_work;
  emulator::watch(address, sizeof(T), emulator::Access::kAtomic);
  const T before = *address;
  *address += value;
  return before;
}
template <class T>
T atomicExch(T* address, T value) {
  const emulator::AtWork at_work;
  emulator::watch(address, sizeof(T), emulator::Access::kAtomic);
  const T before = *address;
  *address = value;
  return before;
}
template <class T>
T atomicMax(T* address, T value) {
  const emulator::AtWork at_work;
  emulator::watch(address, sizeof(T), emulator::Access::kAtomic);
  const T before = *address;
  *address = std::max(before, value);
  return before;
}

namespace jitattn {
// Definition of `extern __shared__` arrays.
alignas(1024) inline unsigned char s_storage[emulator::kLargestShared];
}  // namespace jitattn

namespace emulator {

inline unsigned char* at_shared(uint32_t addr, int bytes) {
  if (addr % bytes) fail("an access to shared memory is not aligned");
  if (addr + bytes > static_cast<uint32_t>(cta.smem_bytes)) {
    fail("an access leads out of shared memory");
  }
  return jitattn::s_storage + addr;
}

template <class T>
T load_shared(uint32_t addr) {
  const AtWork at_work;
  T value;
  const unsigned char* from = at_shared(addr, sizeof(T));
  watch(from, sizeof(T), Access::kRead);
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
void store_shared(uint32_t addr, const T& value) {
  const AtWork at_work;
  unsigned char* to = at_shared(addr, sizeof(T));
  watch(to, sizeof(T), Access::kWrite);
  std::memcpy(to, &value, sizeof(T));
}

// A static shared array of a kernel. It is filled with NaN at first, as dynamic memory is.
struct SharedArray {
#ifdef WATCHED
  SharedArray(void* begin, size_t bytes);
#else
  SharedArray(void*, size_t) {}
#endif
};

}  // namespace emulator

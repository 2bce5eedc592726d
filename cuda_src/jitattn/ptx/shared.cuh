// Shared-memory addresses, plain accesses by address, and CTA barriers.
// PTX ISA: "cvta", "ld.shared", "st.shared", "bar.sync".
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// cvta.to.shared.u64: generic pointer -> 32-bit shared address
__device__ __forceinline__ uint32_t shared_addr(const void* generic) {
  uint32_t addr;
  asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }"
      : "=r"(addr)
      : "l"(generic));
  return addr;
}

// ld.shared.b32
__device__ __forceinline__ uint32_t ld_shared_b32(uint32_t addr) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(addr) : "memory");
  return value;
}

// ld.shared.v4.b32
__device__ __forceinline__ Vec16 ld_shared_v4(uint32_t addr) {
  Vec16 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(addr)
               : "memory");
  return v;
}

// ld.shared.b64
__device__ __forceinline__ int64_t ld_shared_b64(uint32_t addr) {
  int64_t value;
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(value) : "r"(addr) : "memory");
  return value;
}

// ld.shared.f32
__device__ __forceinline__ float ld_shared_f32(uint32_t addr) {
  return __uint_as_float(ld_shared_b32(addr));
}

// st.shared.b64
__device__ __forceinline__ void st_shared_b64(uint32_t addr, int64_t value) {
  asm volatile("st.shared.b64 [%0], %1;" ::"r"(addr), "l"(value) : "memory");
}

// st.shared.v2.b64
__device__ __forceinline__ void st_shared_v2_b64(uint32_t addr, int64_t first, int64_t second) {
  asm volatile("st.shared.v2.b64 [%0], {%1, %2};" ::"r"(addr), "l"(first), "l"(second) : "memory");
}

// st.shared.b32
__device__ __forceinline__ void st_shared_b32(uint32_t addr, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(value) : "memory");
}

// st.shared.v4.b32
__device__ __forceinline__ void st_shared_v4(uint32_t addr, const Vec16& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// bar.sync 0, N: unlike __syncthreads, warps may arrive from different places in the code
template <int kNumThreads>
__device__ __forceinline__ void barrier_sync() {
  asm volatile("bar.sync 0, %0;" ::"n"(kNumThreads) : "memory");
}

}  // namespace jitattn::ptx

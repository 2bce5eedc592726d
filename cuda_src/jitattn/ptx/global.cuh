// Atomic sums and flags in global memory, shared by several CTAs.
// PTX ISA: "red", "ld", "fence".
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// red.global.add.f32, relaxed: no thread waits for the result
__device__ __forceinline__ void red_add(float* g_sum, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(g_sum), "f"(value) : "memory");
}

// red.global.add.v2.f32: sm_90 and newer
__device__ __forceinline__ void red_add_v2(float* g_sum, float x, float y) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(g_sum), "f"(x), "f"(y)
               : "memory");
}

// red.global.add.v4.f32: sm_90 and newer
__device__ __forceinline__ void red_add_v4(float* g_sum, const float (&value)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(g_sum),
               "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3])
               : "memory");
}

// ld.acquire: writes before the flag's release are visible after it
__device__ __forceinline__ int32_t ld_acquire(const int32_t* g_flag) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(g_flag) : "memory");
  return value;
}

// red.release.add: ordered after everything that this thread has observed
__device__ __forceinline__ void red_release_add(int32_t* g_flag, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(g_flag), "r"(value) : "memory");
}

}  // namespace jitattn::ptx

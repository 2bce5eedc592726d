// Special registers. PTX ISA: "Special registers".
// volatile, so that a value read again is not kept in a register in between: the main loop has none
// to spare, and the epilogue derives its indices again from these.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// mov.u32 %ctaid.x
__device__ __forceinline__ uint32_t cta_idx() {
  uint32_t idx;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(idx));
  return idx;
}

// mov.u32 %tid.x
__device__ __forceinline__ uint32_t thread_idx() {
  uint32_t idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
  return idx;
}

}  // namespace jitattn::ptx

// Barriers in shared memory that also count bytes written by TMA. PTX ISA: "mbarrier".
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// mbarrier.init.shared::cta.b64
__device__ __forceinline__ void mbarrier_init(uint32_t s_barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(s_barrier), "r"(num_arrivals));
}

// fence.mbarrier_init.release.cluster: TMA sees the barriers that were initialised before
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive.shared::cta.b64
__device__ __forceinline__ void mbarrier_arrive(uint32_t s_barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(s_barrier) : "memory");
}

// mbarrier.arrive.expect_tx.shared::cta.b64: arrives, and adds bytes that the phase waits for
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t s_barrier, uint32_t num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(s_barrier),
               "r"(num_bytes)
               : "memory");
}

// mbarrier.try_wait.parity.shared::cta.b64
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t s_barrier, uint32_t parity) {
  uint32_t is_over;
  asm volatile(
      "{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; "
      "selp.u32 %0, 1, 0, over; }"
      : "=r"(is_over)
      : "r"(s_barrier), "r"(parity)
      : "memory");
  return is_over != 0;
}

// Waits until the phase of a parity is over. Debug builds stop the kernel after many tries.
__device__ __forceinline__ void mbarrier_wait(uint32_t s_barrier, uint32_t parity) {
#ifdef JITATTN_DEBUG_ASSERT
  constexpr int kMostTries = 1 << 22;
  for (int i = 0; i < kMostTries; ++i) {
    if (mbarrier_try_wait(s_barrier, parity)) return;
  }
  __trap();
#else
  asm volatile(
      "{ .reg .pred over; again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1; "
      "@!over bra again; }" ::"r"(s_barrier),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace jitattn::ptx

// Asynchronous copies from global to shared memory. PTX ISA: "cp.async".
// The "memory" clobbers keep the compiler from moving shared-memory accesses across a wait.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// cp.async.cg.shared.global.L2::128B [dst], [src], 16;
__device__ __forceinline__ void cp_async_16B(uint32_t dst_addr, const void* src) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(dst_addr), "l"(src)
               : "memory");
}

// cp.async.cg with src-size: reads only src_bytes (0 to 16) and fills the rest with zeros.
__device__ __forceinline__ void cp_async_16B_zfill(uint32_t dst_addr, const void* src,
                                                   uint32_t src_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst_addr), "l"(src),
               "r"(src_bytes)
               : "memory");
}

// cp.async.commit_group;
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group N; returns when at most N of this thread's groups are pending
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace jitattn::ptx

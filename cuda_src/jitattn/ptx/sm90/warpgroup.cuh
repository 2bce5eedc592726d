// Registers and barriers of warpgroups. PTX ISA: "setmaxnreg", "bar".
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// setmaxnreg.dec.sync.aligned.u32
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// setmaxnreg.inc.sync.aligned.u32
template <int kRegisters>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// bar.sync: one of the 16 barriers of a CTA, for some of its threads
__device__ __forceinline__ void named_barrier_sync(int idx, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(idx), "r"(num_threads) : "memory");
}

// bar.arrive
__device__ __forceinline__ void named_barrier_arrive(int idx, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(idx), "r"(num_threads) : "memory");
}

}  // namespace jitattn::ptx

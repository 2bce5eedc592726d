// Barriers between the warpgroup that copies and computes dQ, and those that own keys.
//
//   full      of K, and each stage of Q and dO: written by TMA; Q with the statistics of its rows, and
//             V with the first dO
//   ds_full   dS of a step is written, and so Q and dO of the step before are read: a warpgroup's
//             products end in order. Nobody says otherwise that a stage of Q or dO is free.
//   ds_empty  dS is read
#pragma once

#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct BwdBarriers {
  using Traits = BwdSm90Traits<Spec>;
  static constexpr int kWarps = 4;  // of the warpgroup that copies
  const uint32_t s_addr;

  __device__ explicit BwdBarriers(uint32_t s_storage_addr)
      : s_addr(s_storage_addr + Traits::kOffsetBarriers) {}

  __device__ uint32_t k_full() const { return s_addr; }
  __device__ uint32_t q_full(int stage) const { return s_addr + 8 + stage * 16; }
  __device__ uint32_t d_out_full(int stage) const { return q_full(stage) + 8; }
  __device__ uint32_t ds_full(int slot) const { return q_full(Traits::kStages) + slot * 16; }
  __device__ uint32_t ds_empty(int slot) const { return ds_full(slot) + 8; }

  // Called by one thread, before a barrier of all.
  __device__ void init() const {
    ptx::mbarrier_init(k_full(), 1);
#pragma unroll
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      ptx::mbarrier_init(q_full(stage), 1 + kWarps);  // a lane with TMA, and the statistics
      ptx::mbarrier_init(d_out_full(stage), 1);
    }
#pragma unroll
    for (int slot = 0; slot < Traits::kSlots; ++slot) {
      ptx::mbarrier_init(ds_full(slot), Traits::kKeyWarps);
      ptx::mbarrier_init(ds_empty(slot), kWarps);
    }
    ptx::mbarrier_init_fence();
  }
};

}  // namespace jitattn

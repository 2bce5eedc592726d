// Barriers of the stages of Q, K and V.
#pragma once

#include "jitattn/fwd/sm90/traits.cuh"
#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/tile/ring.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Barriers in shared memory: of each stage, one that says it is full and one that says it is empty.
template <class Spec>
struct FwdBarriers {
  using Traits = FwdSm90Traits<Spec>;
  const uint32_t s_addr;

  __device__ explicit FwdBarriers(uint32_t s_storage_addr)
      : s_addr(s_storage_addr + Traits::kOffsetBarriers) {}

  __device__ uint32_t q_full(int stage) const { return s_addr + stage * 16; }
  __device__ uint32_t q_empty(int stage) const { return s_addr + stage * 16 + 8; }
  __device__ uint32_t k_full(int stage) const { return kv(stage); }
  __device__ uint32_t k_empty(int stage) const { return kv(stage) + 8; }
  __device__ uint32_t v_full(int stage) const { return kv(stage) + 16; }
  __device__ uint32_t v_empty(int stage) const { return kv(stage) + 24; }

  // Called by one thread, before a barrier of all.
  __device__ void init() const {
#pragma unroll
    for (int i = 0; i < Traits::kNumBarriers; ++i) {
      // A stage is filled by one thread and TMA, and emptied by every consumer warp.
      ptx::mbarrier_init(s_addr + i * 8, i % 2 == 0 ? 1 : Traits::kConsumerWarps);
    }
    ptx::mbarrier_init_fence();
  }

 private:
  __device__ uint32_t kv(int stage) const { return s_addr + Spec::kQStages * 16 + stage * 32; }
};

}  // namespace jitattn

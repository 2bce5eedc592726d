// The order in which key blocks add to a query tile's sums of dQ, if it is fixed: the dq semaphore
// counts the warps that have added. Each warp adds to its own rows.
#pragma once

#include "jitattn/bwd/sm80/dq_sums.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm90/pipeline.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/bwd/sm90/work.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/sm90/elected.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// A turn is passed on when the next one is taken: additions are finished by then.
template <class Spec>
struct DqTurn {
  using Traits = BwdSm90Traits<Spec>;

  int32_t* g_taken = nullptr;  // semaphore of the tile that this warp adds to

  // Waits until all warps of the key blocks before have added to a tile.
  __device__ __forceinline__ void take(const BwdSm90Work<Spec>& work, const QueryStep& step) {
    pass();
    const int head_idx = work.first_head() + step.head;
    const KeyBlock<Spec> keys(work.params, work.sequence, head_idx, work.own.tile);
    const int count = keys.semaphore_value(step.tile) * BwdBarriers<Spec>::kWarps;
    g_taken = dq_semaphore<Spec>(work.params, work.own.batch, head_idx, step.tile);
    if (threadIdx.x % 32 == 0) {
      // Warps of this block may have counted already.
      while (ptx::ld_acquire(g_taken) < count) __nanosleep(32);
    }
    __syncwarp();
    if constexpr (Traits::kDqInFragments) ptx::fence_proxy_async_global();
  }

  // Publishes what this warp has added, if anything, and counts it.
  __device__ __forceinline__ void pass() const {
    if (g_taken == nullptr) return;
    if constexpr (Traits::kDqInFragments) ptx::bulk_wait<0>();
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::red_release_add(g_taken, 1);
  }
};

}  // namespace jitattn

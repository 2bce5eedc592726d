// The order in which key blocks add to a query tile's sums of dQ, if it is fixed: the dq semaphore
// counts the warps that have added. Each warp adds to its own rows.
#pragma once

#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm90/pipeline.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/bwd/sm90/work.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/sm90/elected.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// What takes long is done beside other things: a look at the semaphore beside the wait for dS, and
// the passing on of a turn beside the first product of the next step.
template <class Spec>
struct DqTurn {
  using Traits = BwdSm90Traits<Spec>;

  const typename Traits::Params& params;
  int taken = -1;  // index of the tile that this warp added to last, among all; 31 bits count them
  int next = -1;   // of the tile that it adds to next
  int wanted = 0;  // the value by which the turn is its own
  bool is_own = false;

  // Finds the semaphore of a step, and looks whether all warps of the key blocks before have added.
  __device__ __forceinline__ void look(const BwdSm90Work<Spec>& work, const QueryStep& step) {
    const int head_idx = work.first_head() + step.head;
    const KeyBlock<Spec> keys(work.params, work.sequence, head_idx, work.own.tile);
    wanted = keys.semaphore_value(step.tile) * BwdBarriers<Spec>::kWarps;
    next = (work.own.batch * params.heads_q + head_idx) * params.num_q_tiles + step.tile;
    is_own = threadIdx.x % 32 != 0 || ptx::ld_acquire(params.dq_semaphore + next) >= wanted;
  }

  // Waits for the turn that was looked for.
  __device__ __forceinline__ void take() {
    while (!is_own) {  // the first lane alone; warps of this block may have counted already
      __nanosleep(32);
      is_own = ptx::ld_acquire(params.dq_semaphore + next) >= wanted;
    }
    __syncwarp();
    if constexpr (Traits::kDqInFragments) ptx::fence_proxy_async_global();
    taken = next;
  }

  // Publishes what this warp has added, if anything, and counts it.
  __device__ __forceinline__ void pass() const {
    if (taken < 0) return;
    if constexpr (Traits::kDqInFragments) ptx::bulk_wait<0>();
    __syncwarp();  // the first lane releases what all have added
    if (threadIdx.x % 32 == 0) ptx::red_release_add(params.dq_semaphore + taken, 1);
  }
};

}  // namespace jitattn

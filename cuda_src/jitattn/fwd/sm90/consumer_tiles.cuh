// The tiles that a consumer warpgroup is given.
#pragma once

#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/warp_scores.cuh"
#include "jitattn/fwd/sm90/pipeline.cuh"
#include "jitattn/fwd/sm90/traits.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/ptx/sm90/warpgroup.cuh"
#include "jitattn/tile/ring.cuh"
#include "jitattn/tile/warpgroup.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// What consumers keep of a tile; its plan stays in shared memory.
struct ConsumerTile {
  int plan_idx;
  uint32_t s_q;      // of this warpgroup's rows
  uint32_t q_empty;  // the barrier to arrive at when Q is read
  int begin, end;    // key blocks, by ordinals
  bool exists;

  __device__ bool has_blocks() const { return begin < end; }
};

// Whether some row of the warpgroup may not see all keys of a block, as a type.
template <bool kIsMasked>
struct IsMasked {
  static constexpr bool value = kIsMasked;
};

// Calls `step(is_masked, ordinal)` for the key blocks from `ordinal` down to `begin`.
template <class Spec, class Scores, class Step>
__device__ __forceinline__ void walk_blocks(const Scores& scores, int ordinal, int begin,
                                            const Step& step) {
  if constexpr (kHasBlockLists<Spec>) {
#pragma unroll 1
    for (; ordinal >= begin; --ordinal) step(IsMasked<true>{}, ordinal);
  } else if constexpr (kHasGap<Spec>) {
    const WholeBlocks whole = scores.whole_blocks();
#pragma unroll 1
    for (; ordinal >= begin; --ordinal) {
      if (whole.has(ordinal)) {
        step(IsMasked<false>{}, ordinal);
      } else {
        step(IsMasked<true>{}, ordinal);
      }
    }
  } else {
#pragma unroll 1
    for (; ordinal >= begin && scores.is_cut(ordinal); --ordinal) step(IsMasked<true>{}, ordinal);
#pragma unroll 1
    for (; ordinal >= begin; --ordinal) step(IsMasked<false>{}, ordinal);
  }
}

// Gives a consumer its tiles, in order.
template <class Spec>
struct ConsumerTiles {
  using Traits = FwdSm90Traits<Spec>;
  using Work = CtaWork<Spec>;
  using Tile = ConsumerTile;
  using Plan = typename Traits::Plan;

  const typename Traits::Params& params;
  const unsigned char* const s_storage;
  const FwdBarriers<Spec> barriers;
  const uint32_t s_addr;
  const int consumer;
  Ring<Spec::kQStages> q_ring;
  Ring<Traits::kPlans> plan_ring;

  __device__ ConsumerTiles(const typename Traits::Params& params, const unsigned char* s_storage,
                           uint32_t s_addr, int consumer)
      : params(params),
        s_storage(s_storage),
        barriers(s_addr),
        s_addr(s_addr),
        consumer(consumer),
        q_ring{0, 0},
        plan_ring{0, 0} {}

  // Loads a plan.
  __device__ __forceinline__ Plan plan_of(int plan_idx) const {
    Plan plan = *reinterpret_cast<const Plan*>(s_storage + Traits::kOffsetPlans +
                                               plan_idx * Traits::kBytesPlan);
    int* words = reinterpret_cast<int*>(&plan);
    constexpr int kWords = (kIsUniform<Spec> ? sizeof(WorkTile) : sizeof(Plan)) / 4;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = uniform(words[i]);
    return plan;
  }

  __device__ __forceinline__ Work work_of(const Plan& plan) const {
    if constexpr (kHasBlockLists<Spec>) {
      return Work(params, plan.tile, plan.sequence, plan.range);
    } else {
      return Work(params, plan.tile, plan.sequence);
    }
  }
  __device__ __forceinline__ Work work_of(const Tile& tile) const {
    return work_of(plan_of(tile.plan_idx));
  }

  // Waits for a tile, and derives its range.
  __device__ __forceinline__ Tile next() {
    ptx::mbarrier_wait(barriers.q_full(q_ring.stage), q_ring.parity);
    Plan plan = plan_of(plan_ring.stage);
    Tile tile;
    tile.exists = plan.tile.batch_idx >= 0;
    plan.tile.batch_idx = max_of(0, plan.tile.batch_idx);
    const Work work = work_of(plan);
    tile.plan_idx = plan_ring.stage;
    tile.s_q = uniform(s_addr + q_ring.stage * Traits::kBytesQ + consumer * Traits::kBytesConsumer);
    tile.q_empty = barriers.q_empty(q_ring.stage);
    tile.begin = work.range.begin;
    tile.end = tile.exists ? work.range.end : work.range.begin;
    if constexpr (Spec::kQLayout == SeqLayout::kRagged) {
      if (tile.has_blocks()) clear_missing_rows(work, tile.s_q);
    }
    q_ring.advance();
    plan_ring.advance();
    return tile;
  }

 private:
  // Zeros the rows of Q after the last query, and before the first one of lists: those of another
  // sequence would have a vote in when maxima are raised, and so change the last bits of this one.
  __device__ __forceinline__ void clear_missing_rows(const Work& work, uint32_t s_q) const {
    const int first_row = work.first_row() + consumer * 64;
    const int end = work.rows.num_rows - first_row;
    const int begin = work.sequence.first_position * work.rows.heads_per_tile - first_row;
    if (end >= 64 && begin <= 0) return;
    clear_rows<64, 128, Traits::kPagesQk>(s_q, threadIdx.x % 128, max_of(begin, 0), end);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kOwnBarrier + consumer, 128);
  }
};

}  // namespace jitattn

// A consumer warpgroup: computes 64 rows of each tile.
#pragma once

#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/epilogue.cuh"
#include "jitattn/attention/row_scale.cuh"
#include "jitattn/attention/warp_scores.cuh"
#include "jitattn/fwd/sm90/consumer_tiles.cuh"
#include "jitattn/fwd/sm90/gathered_blocks.cuh"
#include "jitattn/fwd/sm90/pipeline.cuh"
#include "jitattn/fwd/sm90/traits.cuh"
#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/ptx/sm90/warpgroup.cuh"
#include "jitattn/ptx/sm90/wgmma.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Lets the consumers issue their products one after the other, so that one computes exponentials
// while another multiplies.
template <int kConsumers>
struct Turn {
  const int consumer;

  __device__ void wait() const { ptx::named_barrier_sync(kTurnBarrier + consumer, 256); }
  __device__ void pass() const {
    const int next = consumer + 1 == kConsumers ? 0 : consumer + 1;
    ptx::named_barrier_arrive(kTurnBarrier + next, 256);
  }
  // The first turn is nobody's to pass.
  __device__ void begin() const {
    if (consumer == 0) ptx::named_barrier_arrive(kTurnBarrier, 256);
  }
};

template <class Spec>
struct FwdConsumer {
  using Traits = FwdSm90Traits<Spec>;
  using Work = CtaWork<Spec>;
  using Scores = WarpScores<Spec, Traits, ListedBlock>;
  using Softmax = typename Traits::Softmax;
  using Tile = ConsumerTile;
  using Plan = typename Traits::Plan;
  using Tiles = ConsumerTiles<Spec>;
  using Out = Scalar<Spec::kDtype>;
  static constexpr bool kDrops = Spec::kDropout == Switch::kOn;
  static constexpr bool kIsBf16 = Spec::kDtype == Dtype::kBf16;
  // Functions of the distance begin the sums of scores, as in the backward kernels: these find a
  // score of 1e4 again to the last bit only if it is rounded alike.
  static constexpr bool kBeginsScores =
      Spec::kSoftcap == Switch::kOff && !kHasBlockLists<Spec> &&
      (Spec::kRelativeBias == Switch::kOn || Spec::kAlibi == Switch::kOn);

  const typename Traits::Params& params;
  const FwdBarriers<Spec> barriers;
  const uint32_t s_addr;
  const int consumer;
  const Turn<Traits::kConsumers> turn;
  const RowScale<Spec, 1> scale;
  Tiles tiles;
  ListedBlock listed;
  // Of the block whose weights are next to be multiplied, or, between tiles, of the next scores.
  Ring<Spec::kStages> ring;
  Ring<kListedBlocks<Spec>> listed_ring;  // of the next block to be weighed
  typename Traits::Output r_o;
  typename Traits::Scores r_s;
  typename Traits::Weights r_p;
  Softmax softmax;

  __device__ FwdConsumer(const typename Traits::Params& params, const unsigned char* s_storage,
                         uint32_t s_addr, int consumer)
      : params(params),
        barriers(s_addr),
        s_addr(s_addr),
        consumer(consumer),
        turn{consumer},
        scale(params),
        tiles(params, s_storage, s_addr, consumer),
        listed{0},
        ring{0, 0},
        listed_ring{0, 0} {}

  // The last output of a tile and the first scores of the next are computed together, and results
  // are written while other consumers multiply.
  __device__ __forceinline__ void run() {
    turn.begin();
    Tile tile = tiles.next();
    change_tile(tile, tile, false);
#pragma unroll 1
    while (tile.exists) {
      if (tile.has_blocks()) visit_blocks(tile);
      release(tile.q_empty);  // all its scores are computed
      const Tile next = tiles.next();
      change_tile(tile, next, true);
      tile = next;
    }
  }

 private:
  __device__ __forceinline__ Scores scores_of(const Work& work) const {
    const int thread_idx = Traits::Threads::idx();
    const WarpPart part = {thread_idx % 32, Traits::first_row(thread_idx / 32), 0, 0,
                           consumer * 64};
    return Scores(work, listed, s_addr, part);
  }

  // Visits the key blocks but the first, from right to left. The scores of a block are computed
  // while the weights of the one before are multiplied by its values.
  __device__ __forceinline__ void visit_blocks(const Tile& tile) {
    ring = {uniform(ring.stage), static_cast<uint32_t>(uniform(ring.parity))};
    const Work work = tiles.work_of(tile);
    const Scores scores = scores_of(work);
    walk_blocks<Spec>(scores, tile.end - 2, tile.begin, [&](auto is_masked, int ordinal) {
      step<is_masked.value>(tile, work, scores, ordinal);
    });
  }

  // kIsMasked: some row of the warpgroup may not see all keys of the block.
  template <bool kIsMasked>
  __device__ __forceinline__ void step(const Tile& tile, const Work& work, const Scores& scores,
                                       int ordinal) {
    const Ring<Spec::kStages> before = ring;
    ring.advance();
    begin_scores(work, scores, ordinal);
    turn.wait();
    ptx::mbarrier_wait(barriers.k_full(ring.stage), ring.parity);
    set_scores(tile.s_q);
    ptx::mbarrier_wait(barriers.v_full(before.stage), before.parity);
    add_output(before.stage);
    turn.pass();
    ptx::wgmma_wait<1>();
    ptx::wgmma_hold(flat(r_s));
    release(barriers.k_empty(ring.stage));
    float factors[1][2];
    const bool rescales = weigh<kIsMasked>(work, scores, ordinal, factors);
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(flat(r_o));
    release(barriers.v_empty(before.stage));
    pack();
    if (rescales) Softmax::rescale(r_o, factors);
  }

  // Finishes a tile and begins the next one: its first block, which may have a tail. Both products
  // are always computed, as branches around them would serialise them; if a tile has no blocks, or
  // there is none, of whatever is in shared memory, and the result is dropped.
  __device__ __forceinline__ void change_tile(const Tile& tile, const Tile& next, bool finishes) {
    const bool has_output = finishes && tile.has_blocks(), has_scores = next.has_blocks();
    const Ring<Spec::kStages> before = ring;
    if (has_output) ring.advance();
    if constexpr (kBeginsScores) {
      Plan plan = tiles.plan_of(next.plan_idx);
      plan.tile.batch_idx = max_of(0, plan.tile.batch_idx);  // where there is no tile
      const Work work = tiles.work_of(plan);
      // Without blocks, of one that may not be there: what is read is checked from above alone.
      begin_scores(work, scores_of(work), max_of(next.end - 1, next.begin));
    }
    turn.wait();
    if (has_scores) ptx::mbarrier_wait(barriers.k_full(ring.stage), ring.parity);
    ptx::wgmma_results_are_dropped(!has_scores);
    set_scores(next.s_q);
    if (has_output) ptx::mbarrier_wait(barriers.v_full(before.stage), before.parity);
    ptx::wgmma_results_are_dropped(!has_output);
    add_output(before.stage);
    ptx::wgmma_results_are_dropped(false);
    turn.pass();
    ptx::wgmma_wait<1>();
    ptx::wgmma_hold(flat(r_s));
    Softmax finished = softmax;
    begin_softmax();
    if (has_scores) {
      release(barriers.k_empty(ring.stage));
      const Work work = tiles.work_of(next);
      float factors[1][2];
      weigh<true>(work, scores_of(work), next.end - 1, factors);
      if constexpr (Spec::kKvLayout == SeqLayout::kRagged || kIsGathered<Spec>) {
        clear_tail(work, next.end - 1);
      }
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(flat(r_o));
    if (has_output) release(barriers.v_empty(before.stage));
    if (finishes) {
      FwdEpilogue<Spec, Traits>(params, tiles.plan_of(tile.plan_idx), Traits::Threads::idx(),
                                s_addr + Traits::kOffsetMerge)
          .finish(r_o, finished);
    }
    clear_output();
    pack();
  }

  __device__ __forceinline__ void begin_softmax() {
    softmax = Softmax();
    if constexpr (Spec::kFixedShift == Switch::kOn) softmax.fix_max(params.neg_shift);
  }

  // r_s = weights of the scores r_s. Returns whether the output must be rescaled, by the factors.
  template <bool kIsMasked>
  __device__ __forceinline__ bool weigh(const Work& work, const Scores& scores, int ordinal,
                                        float (&factors)[1][2]) {
    const int block = work.block_at(ordinal);
    if constexpr (kHasBlockLists<Spec>) {
      listed.s_listed = s_addr + Traits::kOffsetListed + listed_ring.stage * Traits::kBytesListed;
      listed_ring.advance();
    }
    if constexpr (!kBeginsScores) scores.modify(r_s, block);
    scores.apply(r_s, block);
    if constexpr (kIsMasked) scores.mask(r_s, block);
    bool rescales = false;
    if constexpr (Spec::kFixedShift == Switch::kOff) {
      rescales = softmax.raise_max(r_s, factors, scale);
    }
    const auto kept = scores.draw_kept(block);
#pragma unroll
    for (int n = 0; n < Traits::kKeyTiles; ++n) {
      softmax.exponentiate(r_s[0][n], 0, scale);
      if constexpr (kDrops) kept.apply(r_s[0][n], 0, n);
    }
    return rescales;
  }

  // Sets the scores to what Q K^T is added to, if anything.
  __device__ __forceinline__ void begin_scores(const Work& work, const Scores& scores,
                                               int ordinal) {
    if constexpr (kBeginsScores) {
#pragma unroll
      for (int i = 0; i < Traits::kKeyTiles * 4; ++i) flat(r_s)[i] = 0.f;
      scores.modify(r_s, work.block_at(ordinal));
      ptx::wgmma_hold(flat(r_s));
    }
  }

  // ---- Products
  // r_s = Q K^T, or that added to r_s
  __device__ __forceinline__ void set_scores(uint32_t s_q) {
    const WgmmaDescriptor q(s_q, 0);
    const WgmmaDescriptor k(s_addr + Traits::kOffsetK + ring.stage * Traits::kBytesK, 0);
    constexpr int kRows = Spec::kBlockKv;
    ptx::wgmma_fence();
    ptx::wgmma_rows<kIsBf16, kRows, kBeginsScores>(flat(r_s), q.template at_columns<64>(0),
                                                   k.template at_columns<kRows>(0));
#pragma unroll
    for (int d = 1; d < Traits::kDim / 16; ++d) {
      ptx::wgmma_rows<kIsBf16, kRows, true>(flat(r_s), q.template at_columns<64>(d),
                                            k.template at_columns<kRows>(d));
    }
    ptx::wgmma_commit();
    ptx::wgmma_hold(flat(r_s));
  }

  // r_o += P V
  __device__ __forceinline__ void add_output(int stage) {
    const WgmmaDescriptor v(s_addr + Traits::kOffsetV + stage * Traits::kBytesV,
                            Traits::kBytesPage);
    ptx::wgmma_hold(flat(r_o));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Spec::kBlockKv / 16; ++step) {
      ptx::wgmma_columns<kIsBf16, Traits::kDimV>(flat(r_o), r_p[step], v.at_rows(step));
    }
    ptx::wgmma_commit();
    ptx::wgmma_hold(flat(r_o));
  }

  // r_p = r_s, rounded. The accumulators of two n8 tiles are the operand of 16 keys.
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int step = 0; step < Spec::kBlockKv / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&tile)[4] = r_s[0][2 * step + i / 2];
        r_p[step][i] = Out::round_pair(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
      }
    }
  }

  // Zeros the rows of V after the last key: they may be of another sequence, or not a number.
  __device__ __forceinline__ void clear_tail(const CtaWork<Spec>& work, int ordinal) const {
    const int end = work.keys_left(ordinal);
    if (end >= Spec::kBlockKv) return;
    ptx::mbarrier_wait(barriers.v_full(ring.stage), ring.parity);
    const uint32_t s_v = s_addr + Traits::kOffsetV + ring.stage * Traits::kBytesV;
    clear_rows<Spec::kBlockKv, Traits::Threads::kNumThreads, Traits::kPagesV>(
        s_v, Traits::Threads::idx(), 0, end);
    ptx::fence_proxy_async();
    Traits::Threads::sync();
  }

  __device__ __forceinline__ void clear_output() {
#pragma unroll
    for (int i = 0; i < Traits::kColumnTiles * 4; ++i) flat(r_o)[i] = 0.f;
  }
};

}  // namespace jitattn

// Kernel      Forward attention on mma.sync, ldmatrix and cp.async: sm_80 and every newer GPU.
//
// Math        S = Q K^T,  P = exp2(S * scale_log2 - m),  O = P V / rowsum(P),
//             LSE = (log2(rowsum P) + m) * ln 2, with a running maximum m per row.
//
// Paper       Dao, FlashAttention-2, arXiv:2307.08691, Algorithm 1. We differ in: the lazy maximum
//             (softmax.cuh), key blocks visited from right to left, GQA rows packed into the tile
//             (rows.cuh), and warps that may split the keys of a step among them.
//
// Work split  One CTA: kBlockQ rows of one kv head's queries (schedule.cuh) and a range of key
//             blocks. Warp (warp_q, warp_kv) owns kWarpRows rows and kWarpKeys of each block's
//             keys.
//
// Shared      Q [kBlockQ, kDim] for the whole run, K [kStages][kBlockKv, kDim],
// memory      V [kStages][kBlockKv, kDimV], all swizzled (tile/swizzle.cuh). Afterwards: partial
//             results of the warps, then the output tile.
//
// Pipeline    kStages >= 2: a ring. Step i waits for its block, meets the one barrier, starts the
//             copy of block i + kStages - 1 into the buffer that step i - 1 left, and computes.
//               step i   | wait i | barrier | start i+1 | S_i  softmax  O_i |
//               step i+1                                 (i+1 lands)        | wait i+1 | barrier
//               ...
//             kStages == 1: K and V have a buffer each. V_i lands under S_i, K_i+1 under softmax
//             and O_i, for two barriers a step and half the shared memory.
//
// Sequences   Batched, ragged, or keys in pages (sequence.cuh, gathered_rows.cuh). Splits of a
//             tile's keys are merged, in their order, by the CTA that finishes last
//             (split_combine.cuh).
//
// Sums        The output is accumulated in fp32, or in fp16 over 2048 keys at a time
//             (tile/two_level_accumulator.cuh).
//
// Masks       Positions determine the blocks that a CTA visits (KvBlockRange): causal, a window
//             with the first keys, local + stride; or block lists do (block_lists.cuh). Scores are
//             modified in score.cuh, hidden in mask.cuh.
#pragma once

#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/epilogue.cuh"
#include "jitattn/attention/row_scale.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/attention/warp_scores.cuh"
#include "jitattn/debug.cuh"
#include "jitattn/fwd/sm80/gathered_rows.cuh"
#include "jitattn/fwd/sm80/loader.cuh"
#include "jitattn/fwd/sm80/products.cuh"
#include "jitattn/fwd/sm80/traits.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/special.cuh"
#include "jitattn/tile/accumulator.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// One step: the scores of a key block, and its contribution to the output.
template <class Spec>
struct FwdStep {
  using Traits = FwdTraits<Spec>;

  const CtaWork<Spec>& work;
  const GatheredRows<Spec>& gathered;
  TileLoader<Spec>& loader;
  const WarpProducts<Spec>& products;
  const WarpScores<Spec, Traits, GatheredRows<Spec>>& scores;
  RowScale<Spec, Traits::kRowTiles>& scale;
  typename Traits::Softmax& softmax;
  const typename Traits::TwoLevel& two_level;
  typename Traits::Output& r_o;
  int stage;  // the buffer that holds the block

  // kIsMasked: some row may not see all keys of the block, or some keys may not exist.
  template <bool kIsMasked>
  __device__ __forceinline__ void run(int ordinal) {
    const int block = work.block_at(ordinal);
    typename Traits::Scores r_s = {};
    scores.template add_early<kIsMasked>(r_s, block, stage);
    loader.template begin_step<kIsMasked>(ordinal, stage);
    typename GatheredRows<Spec>::Lookup found;
    gathered.look_up_next(found, ordinal, work.range);
    scale.load_keys(work, block * Spec::kBlockKv + scores.part.first_key);
    const bool sees_any = !kIsMasked || scores.is_seen(block);
    if (sees_any) {
      scores.add_staged(r_s, block, stage);
      products.add_scores(r_s, stage);
      scale.remove_initial_bias(r_s);
      scores.cap(r_s, block, stage);
    }
    loader.end_scores(ordinal);
    if (sees_any) {
      if constexpr (kIsMasked) scores.mask(r_s, block);
      if constexpr (Spec::kFixedShift == Switch::kOff) softmax.update_max(r_s, r_o, scale);
      products.add_output(r_o, r_s, stage, softmax, scale, scores.draw_kept(block));
    }
    two_level.flush_if_due(r_o, softmax.neg_max, ordinal);
    gathered.store_next(found, ordinal);
    stage = stage + 1 == Spec::kStages ? 0 : stage + 1;
  }
};

// Writes the output. The work of the CTA is derived again, or read back from shared memory, since
// the main loop has no registers to hold it.
template <class Spec, class Traits = FwdTraits<Spec>>
__device__ __forceinline__ void finish(const FwdParamsOf<Spec>& params,
                                       const unsigned char* s_storage, typename Traits::Output& r_o,
                                       typename Traits::Softmax& softmax,
                                       const typename Traits::TwoLevel& two_level) {
  CtaPlan plan;
  if constexpr (kIsUniform<Spec>) {
    plan.tile = work_tile<Spec>(params, ptx::cta_idx());
    plan.sequence = Sequence::of<Spec>(params, plan.tile.batch_idx);
  } else {
    Traits::Threads::sync();  // one thread wrote the plan
    plan = *reinterpret_cast<const CtaPlan*>(s_storage + Traits::kOffsetPlan);
  }
  const FwdEpilogue<Spec, Traits> epilogue(params, plan, ptx::thread_idx(),
                                           ptx::shared_addr(s_storage));
  if constexpr (Traits::kIsTwoLevel) {
    WideTile r_sum[Traits::kRowTiles][Traits::kColumnTiles];
    two_level.collect(r_sum, r_o, softmax.neg_max);
    epilogue.finish(r_sum, softmax);
  } else {
    epilogue.finish(r_o, softmax);
  }
}

template <class Spec>
__device__ __forceinline__ void attn_fwd(const FwdParamsOf<Spec>& params) {
  using Traits = FwdTraits<Spec>;

  // ---- Indices
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int warp_q = warp_idx % Spec::kWarpsQ, warp_kv = warp_idx / Spec::kWarpsQ;
  const WorkTile tile = work_tile<Spec>(params, blockIdx.x);
  if (!kIsUniform<Spec> && tile.batch_idx < 0) return;
  const CtaWork<Spec> work(params, tile);
  const KvBlockRange& range = work.range;
  const OperandOffsets offsets = OperandOffsets::of<Spec>(work);

  // ---- Shared storage
  extern __shared__ __align__(128) unsigned char s_storage[];
  const uint32_t s_addr = ptx::shared_addr(s_storage);
  JITATTN_DEVICE_ASSERT(s_addr % 128 == 0);
  if (!kIsUniform<Spec> && threadIdx.x == 0) {
    // Kept for the epilogue in shared memory, not in registers.
    *reinterpret_cast<CtaPlan*>(s_storage + Traits::kOffsetPlan) = {tile, work.sequence};
  }

  // ---- Copies, products and scores; register tiles
  const OperandCopies<Spec> copies(params);
  const int first_row = Traits::first_row(warp_q);
  const WarpPart part = {lane_idx, first_row, warp_kv * Traits::kWarpKeys, warp_kv, first_row};
  WarpProducts<Spec> products(s_addr, part);
  typename Traits::Output r_o = {};
  typename Traits::Softmax softmax;
  if constexpr (Spec::kFixedShift == Switch::kOn) softmax.fix_max(params.neg_shift);
  const typename Traits::TwoLevel two_level(s_addr + Traits::kOffsetTwoLevel, threadIdx.x,
                                            range.begin, range.end);
  RowScale<Spec, Traits::kRowTiles> scale(params);
  int ordinal = range.end - 1;  // of the current step
  const GatheredRows<Spec> gathered(params, work.sequence, tile.batch_idx, s_addr);
  TileLoader<Spec> loader(work, offsets, copies, gathered, s_addr);
  const WarpScores<Spec, Traits, GatheredRows<Spec>> scores(work, gathered, s_addr, part);

  // ---- Prologue. Without a block, the tile may have no rows.
  if (kIsUniform<Spec> || ordinal >= range.begin) scale.load_rows(work, scores.rows);
  if (ordinal >= range.begin) {
    loader.start(ordinal);
    if constexpr (Traits::kHoldsQ) {
      loader.wait_for_q();
      products.hold_q();
    }
    if (!kIsScaled<Spec> && params.negate_q) loader.negate_q();
  }

  // ---- Main loops, from right to left
  FwdStep<Spec> step = {work,  gathered, loader,    products, scores,
                        scale, softmax,  two_level, r_o,      0};
  if constexpr (kHasBlockLists<Spec>) {
#pragma unroll 1
    for (; ordinal >= range.begin; --ordinal) step.template run<true>(ordinal);
  } else if constexpr (kHasGap<Spec>) {
    const WholeBlocks whole = scores.whole_blocks();
#pragma unroll 1
    for (; ordinal >= range.begin; --ordinal) {
      if (whole.has(ordinal)) {
        step.template run<false>(ordinal);
      } else {
        step.template run<true>(ordinal);
      }
    }
  } else {
    // Blocks on a mask boundary of this warp's rows, then those that every row sees entirely.
#pragma unroll 1
    for (; ordinal >= range.begin && scores.is_cut(ordinal); --ordinal) {
      step.template run<true>(ordinal);
    }
#pragma unroll 1
    for (; ordinal >= range.begin; --ordinal) step.template run<false>(ordinal);
  }

  finish<Spec>(params, s_storage, r_o, softmax, two_level);
}

}  // namespace jitattn

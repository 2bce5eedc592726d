// A consumer warpgroup for fp32 operands that were split into fp16 parts (prepare/split_fp32.cuh).
//
// Math        Products are of parts, low * high, high * low and high * high, or of one part alone;
//             sums of 64 columns of Q, and of the 64 keys of a block, are promoted to ordinary sums,
//             in the order of tile/mma/f16_parts.cuh: the backward kernel finds the same scores.
//
// Pipeline    S_0 P_0 O_0 | S_1 P_1 O_1 | ... in each consumer: three products last so much longer
//             than the exponentials that those of the others cover them. No registers would be left
//             for scores beside sums of the output.
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
#include "jitattn/ptx/sm90/wgmma.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/wgmma_operand.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct FwdPartsConsumer {
  using Traits = FwdSm90Traits<Spec>;
  using Work = CtaWork<Spec>;
  using Scores = WarpScores<Spec, Traits, ListedBlock>;
  using Softmax = typename Traits::Softmax;
  using Tile = ConsumerTile;
  using Part = Scalar<Dtype::kFp16>;
  static constexpr int kParts = Traits::kParts;
  static constexpr int kSteps = Traits::kDim / 16, kKeySteps = Spec::kBlockKv / 16;
  static constexpr int kPromotedSteps = kParts == 2 ? 4 : kSteps;  // of scores
  static constexpr int kSums = ceil_div(kSteps, kPromotedSteps);
  static constexpr int kLowSteps = Traits::kPagesOfQk * (kPageColumns / 16);  // before low parts
  static_assert(kSums <= 2 && Spec::kBlockKv == 64 && kIsUniform<Spec> && !kHasBlockLists<Spec> &&
                !Spec::kHasFunction && Spec::kSoftcap == Switch::kOff);

  const typename Traits::Params& params;
  const FwdBarriers<Spec> barriers;
  const uint32_t s_addr;
  const int consumer;
  ConsumerTiles<Spec> tiles;
  const ListedBlock listed;  // none
  RowScale<Spec, 1> scale;
  Ring<Spec::kStages> ring;
  typename Traits::Output r_o;
  Softmax softmax;

  __device__ FwdPartsConsumer(const typename Traits::Params& params, const unsigned char* s_storage,
                              uint32_t s_addr, int consumer)
      : params(params),
        barriers(s_addr),
        s_addr(s_addr),
        consumer(consumer),
        tiles(params, s_storage, s_addr, consumer),
        listed{0},
        scale(params),
        ring{0, 0} {}

  __device__ __forceinline__ void run() {
    Tile tile = tiles.next();
#pragma unroll 1
    while (tile.exists) {
      softmax = Softmax();
#pragma unroll
      for (int i = 0; i < Traits::kColumnTiles * 4; ++i) flat(r_o)[i] = 0.f;
      if (tile.has_blocks()) visit_blocks(tile);
      release(tile.q_empty);
      FwdEpilogue<Spec, Traits>(params, tiles.plan_of(tile.plan_idx), Traits::Threads::idx(),
                                s_addr + Traits::kOffsetMerge)
          .finish(r_o, softmax);
      tile = tiles.next();
    }
  }

 private:
  // Visits the key blocks, from right to left.
  __device__ __forceinline__ void visit_blocks(const Tile& tile) {
    ring = {uniform(ring.stage), static_cast<uint32_t>(uniform(ring.parity))};
    const Work work = tiles.work_of(tile);
    const int thread_idx = Traits::Threads::idx();
    const WarpPart part = {thread_idx % 32, Traits::first_row(thread_idx / 32), 0, 0,
                           consumer * 64};
    const Scores scores(work, listed, s_addr, part);
    scale.load_rows(work, scores.rows);
    walk_blocks<Spec>(scores, tile.end - 1, tile.begin, [&](auto is_masked, int ordinal) {
      step<is_masked.value>(tile, work, scores, ordinal);
    });
  }

  // kIsMasked: some row of the warpgroup may not see all keys of the block.
  template <bool kIsMasked>
  __device__ __forceinline__ void step(const Tile& tile, const Work& work, const Scores& scores,
                                       int ordinal) {
    const int block = work.block_at(ordinal);
    scale.load_keys(work, block * Spec::kBlockKv);
    typename Traits::Scores r_s;
    ptx::mbarrier_wait(barriers.k_full(ring.stage), ring.parity);
    set_scores(r_s, tile.s_q);
    release(barriers.k_empty(ring.stage));
    scores.modify(r_s, block);  // key padding, which scales do not change
    if constexpr (kIsMasked) scores.mask(r_s, block);
    softmax.update_max(r_s, r_o, scale);
    const auto kept = scores.draw_kept(block);
#pragma unroll
    for (int n = 0; n < Traits::kKeyTiles; ++n) {
      softmax.exponentiate(r_s[0][n], 0, scale);
      if constexpr (Spec::kDropout == Switch::kOn) kept.apply(r_s[0][n], 0, n);
    }
    ptx::mbarrier_wait(barriers.v_full(ring.stage), ring.parity);
    add_output(r_s);
    release(barriers.v_empty(ring.stage));
    ring.advance();
  }

  // r_s = Q K^T
  __device__ __forceinline__ void set_scores(typename Traits::Scores& r_s, uint32_t s_q) const {
    const WgmmaDescriptor q(s_q, 0);
    const WgmmaDescriptor k(s_addr + Traits::kOffsetK + ring.stage * Traits::kBytesK, 0);
    typename Traits::Scores sums[kSums];
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float (&sum)[Traits::kKeyTiles * 4] = flat(sums[step / kPromotedSteps]);
      const bool is_first = step % kPromotedSteps == 0;
      if constexpr (kParts == 2) {
        multiply(sum, q, k, kLowSteps + step, step, is_first);
        multiply(sum, q, k, step, kLowSteps + step, false);
      }
      multiply(sum, q, k, step, step, kParts == 1 && is_first);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) ptx::wgmma_hold(flat(sums[i]));
#pragma unroll
    for (int j = 0; j < Traits::kKeyTiles * 4; ++j) {
      flat(r_s)[j] = flat(sums[0])[j];
      if constexpr (kSums == 2) flat(r_s)[j] += flat(sums[1])[j];
    }
  }
  // sum += the product of 16 columns of Q and 16 of K, from these steps of 16 on; `sets`: nothing
  // is in the sum yet.
  __device__ __forceinline__ static void multiply(float (&sum)[Traits::kKeyTiles * 4],
                                                  const WgmmaDescriptor& q,
                                                  const WgmmaDescriptor& k, int step_q, int step_k,
                                                  bool sets) {
    constexpr int kRows = Spec::kBlockKv;
    const uint64_t a = q.template at_columns<64>(step_q), b = k.template at_columns<kRows>(step_k);
    if (sets) {
      ptx::wgmma_rows<false, kRows, false>(sum, a, b);
    } else {
      ptx::wgmma_rows<false, kRows, true>(sum, a, b);
    }
  }

  // r_o += P V
  __device__ __forceinline__ void add_output(typename Traits::Scores& r_s) {
    uint32_t r_p[kParts][kKeySteps][4];
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&tile)[4] = r_s[0][2 * step + i / 2];
        const float left = tile[i % 2 * 2], right = tile[i % 2 * 2 + 1];
        const uint32_t high = Part::round_pair(left, right);
        r_p[0][step][i] = high;
        if constexpr (kParts == 2) {
          r_p[1][step][i] = Part::round_pair(left - Part::load(static_cast<uint16_t>(high)),
                                             right - Part::load(static_cast<uint16_t>(high >> 16)));
        }
      }
    }
    typename Traits::Output r_sum;
#pragma unroll
    for (int i = 0; i < Traits::kColumnTiles * 4; ++i) flat(r_sum)[i] = 0.f;
    const uint32_t s_v = s_addr + Traits::kOffsetV + ring.stage * Traits::kBytesV;
    const WgmmaDescriptor high(s_v, Traits::kBytesPage);
    const WgmmaDescriptor low(s_v + Traits::kPagesOfV * Traits::kBytesPage, Traits::kBytesPage);
    ptx::wgmma_hold(flat(r_sum));
    ptx::wgmma_fence();
    if constexpr (kParts == 2) {
      multiply(r_sum, r_p[1], high);
      multiply(r_sum, r_p[0], low);
    }
    multiply(r_sum, r_p[0], high);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(flat(r_sum));
#pragma unroll
    for (int i = 0; i < Traits::kColumnTiles * 4; ++i) {
      flat(r_o)[i] = fmaf(flat(r_sum)[i], scale.of_values, flat(r_o)[i]);
    }
  }

  // sum += the product of a part of P and one of V
  __device__ __forceinline__ static void multiply(typename Traits::Output& r_sum,
                                                  const uint32_t (&r_p)[kKeySteps][4],
                                                  const WgmmaDescriptor& v) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      ptx::wgmma_columns<false, Traits::kDimV>(flat(r_sum), r_p[step], v.at_rows(step));
    }
  }
};

}  // namespace jitattn

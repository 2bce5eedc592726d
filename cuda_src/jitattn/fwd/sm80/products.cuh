// The two products of a warp: Q K^T of its rows and keys, and P V.
#pragma once

#include "jitattn/attention/sequence.cuh"
#include "jitattn/attention/warp_scores.cuh"
#include "jitattn/fwd/sm80/traits.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/swizzle.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct WarpProducts {
  using Traits = FwdTraits<Spec>;
  using Mma = typename Traits::Mma;
  using Scores = typename Traits::Scores;
  using LaneV = typename Mma::template LaneV<Traits::kChunksV>;

  const uint32_t lane_q_addr, lane_k_addr;  // K, V: in buffer 0
  const LaneV lane_v;
  typename Traits::HeldQ r_q;

  __device__ __forceinline__ WarpProducts(uint32_t s_addr, const WarpPart& part)
      : lane_q_addr(s_addr + part.first_row * Swizzle<Traits::kChunksQk>::kRowBytes +
                    lane_offset_row_first<Traits::kChunksQk>(part.lane_idx)),
        lane_k_addr(s_addr + Traits::kOffsetK +
                    part.first_key * Swizzle<Traits::kChunksQk>::kRowBytes +
                    lane_offset_chunk_first<Traits::kChunksQk>(part.lane_idx)),
        lane_v(s_addr + Traits::kOffsetV + part.first_key * Swizzle<Traits::kChunksV>::kRowBytes,
               part.lane_idx) {}

  // Loads the fragments of Q, for all steps.
  __device__ void hold_q() { Mma::template load_q<Traits::kDim>(r_q, lane_q_addr); }

  // r_s += Q K^T
  __device__ __forceinline__ void add_scores(Scores& r_s, int stage) const {
    const uint32_t stage_k_addr = lane_k_addr + stage * Traits::kBytesK;
    if constexpr (Traits::kHoldsQ) {
      Mma::template add_scores<Traits::kDim>(r_s, r_q, stage_k_addr);
    } else {
      Mma::template add_scores<Traits::kDim>(r_s, lane_q_addr, stage_k_addr);
    }
  }

  // r_o += P V with P = exp2(r_s * scale - max), after dropout.
  template <class Output, class Softmax, class Scale, class Kept>
  __device__ __forceinline__ void add_output(Output& r_o, Scores& r_s, int stage, Softmax& softmax,
                                             const Scale& scale, const Kept& kept) const {
    LaneV stage_v = lane_v;
    stage_v.advance(stage * Traits::kBytesV);
    auto exponentiate = [&](float (&tile)[4], int m, int n) {
      softmax.exponentiate(tile, m, scale);
      if constexpr (Spec::kDropout == Switch::kOn) kept.apply(tile, m, n);
    };
    if constexpr (kSplitFp32<Spec>) {
      Mma::add_output(r_o, r_s, stage_v, scale.of_values, exponentiate);
    } else {
      Mma::add_output(r_o, r_s, stage_v, exponentiate);
    }
  }
};

}  // namespace jitattn

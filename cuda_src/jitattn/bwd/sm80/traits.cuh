// Constants derived from the generated Spec of a backward kernel, and checks that host and device
// agree.
#pragma once

#include "jitattn/attention/sequence.cuh"
#include "jitattn/tile/copy.cuh"
#include "jitattn/tile/mma/f16_parts.cuh"
#include "jitattn/tile/mma/f32_acc.cuh"
#include "jitattn/tile/mma/tf32.cuh"
#include "jitattn/tile/power_scale.cuh"
#include "jitattn/tile/warp_grid.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
using BwdParamsOf = typename Conditional<kSplitFp32<Spec>, BwdScaledParams<FwdParamsOf<Spec>>,
                                         BwdParams<FwdParamsOf<Spec>>>::type;

// Selects the MMA class of a backward kernel.
template <Numerics kNumerics, Dtype kDtype>
struct BwdMmaOf {
  using type = MmaF32Acc<kDtype>;
};
template <Dtype kDtype>
struct BwdMmaOf<Numerics::kF16x3, kDtype> {
  using type = MmaF16Parts<3>;
};
template <Dtype kDtype>
struct BwdMmaOf<Numerics::kTf32x3, kDtype> {
  using type = MmaTf32<3>;
};

template <class Spec>
struct BwdTraits {
  static_assert(Spec::kArch >= 80, "the backward kernel needs sm_80 or newer");
  static_assert(sizeof(BwdParamsOf<Spec>) == Spec::kParamsBytes,
                "host and device disagree on BwdParams");

  using Mma = typename BwdMmaOf<Spec::kNumerics, Spec::kDtype>::type;
  using Element = typename Mma::Element;
  static constexpr int kSize = sizeof(Element);
  static constexpr int kNumThreads = Spec::kNumThreads;
  static constexpr int kNumWarps = kNumThreads / 32;

  // Row statistics: LSE, delta, and the sink factor if there are sinks.
  static constexpr bool kHasSinks = Spec::kSinks == Switch::kOn;
  static constexpr int kRowStats = kHasSinks ? 3 : 2;

  // Columns, padded to a multiple of 16 for the MMA.
  static constexpr int kDim = ceil_div(Spec::kHeadDim, 16) * 16;
  static constexpr int kDimV = ceil_div(Spec::kHeadDimV, 16) * 16;

  // Elements of a row. With two parts, hi and lo are adjacent; one scale per tile.
  static constexpr int kParts = kSplitFp32<Spec> ? 2 : 1;
  static constexpr int kWidthQk = kParts * kDim, kWidthV = kParts * kDimV;
  static_assert(!kSplitFp32<Spec> ||
                (kDim == Spec::kHeadDim && kDimV == Spec::kHeadDimV && kIsUniform<Spec> &&
                 kRowsPerScale % Spec::kBlockQ == 0 && kRowsPerScale % Spec::kBlockKv == 0));

  // Number of warps that compute scores: fewer than all if there are few scores.
  static constexpr int kNumScoreWarps = Spec::kWarpsScores;
  // Scores and dP [block_q, block_kv]; dK and dV [block_kv, ...]; dQ [block_q, kDim].
  using GridS = WarpGrid<Spec::kBlockQ, Spec::kBlockKv, Spec::kWarpsQ, kNumScoreWarps>;
  using GridDk = WarpGrid<Spec::kBlockKv, kDim, Spec::kWarpsKeys, kNumWarps>;
  using GridDv = WarpGrid<Spec::kBlockKv, kDimV, Spec::kWarpsKeys, kNumWarps>;
  using GridDq = WarpGrid<Spec::kBlockQ, kDim, Spec::kWarpsDq, kNumWarps>;
  static_assert(GridS::kUnits % GridS::kWarpsAcross == 0, "every warp has keys");

  using LayoutQk = Swizzle<kWidthQk * kSize / 16>;
  using LayoutV = Swizzle<kWidthV * kSize / 16>;
  using LayoutP = Swizzle<kParts * Spec::kBlockKv * kSize / 16>;

  template <int kRows, int kHeadDim, int kPaddedDim>
  using Copy = TileCopy<Element, kRows, kHeadDim, kPaddedDim, kNumThreads, Spec::kAccess>;
  using CopyQ = Copy<Spec::kBlockQ, kParts * Spec::kHeadDim, kWidthQk>;
  using CopyDo = Copy<Spec::kBlockQ, kParts * Spec::kHeadDimV, kWidthV>;
  using CopyK = Copy<Spec::kBlockKv, kParts * Spec::kHeadDim, kWidthQk>;
  using CopyV = Copy<Spec::kBlockKv, kParts * Spec::kHeadDimV, kWidthV>;

  // Shared memory in bytes: K, V, the Q buffers, the dO buffers, P, dS, two buffers of the row
  // statistics with the scales of Q and dO, the scales of dS, and two buffers of the list entries
  // of this key block.
  static constexpr int kBytesK = Spec::kBlockKv * kWidthQk * kSize;
  static constexpr int kBytesV = Spec::kBlockKv * kWidthV * kSize;
  static constexpr int kBytesQ = Spec::kBlockQ * kWidthQk * kSize;
  static constexpr int kBytesDo = Spec::kBlockQ * kWidthV * kSize;
  static constexpr int kBytesP = Spec::kBlockQ * kParts * Spec::kBlockKv * kSize;
  static constexpr int kBytesRowStats = Spec::kBlockQ * 4 * kRowStats;
  static constexpr int kBytesStats = kBytesRowStats + (kSplitFp32<Spec> ? 16 : 0);
  static constexpr int kBytesListed = Spec::kBlockKv / 16 * 8;
  static constexpr int kOffsetV = kBytesK;
  static constexpr int kOffsetQ = kOffsetV + kBytesV;
  static constexpr int kOffsetDo = kOffsetQ + Spec::kStages * kBytesQ;
  static constexpr int kOffsetP = kOffsetDo + Spec::kStages * kBytesDo;
  static constexpr int kOffsetDs = kOffsetP + kBytesP;
  static constexpr int kOffsetStats = kOffsetDs + kBytesP;
  static constexpr int kOffsetScales = kOffsetStats + 2 * kBytesStats;
  static constexpr int kOffsetListed = kOffsetScales + (kSplitFp32<Spec> ? kNumScoreWarps * 4 : 0);
  // Results for as many query tiles as there are threads: whether the list contains any key of the
  // block, whether every row sees all keys, and the cell bits of the list.
  static constexpr int kOffsetFound = kOffsetListed + (kHasBlockLists<Spec> ? 2 * kBytesListed : 0);
  static constexpr int kBytesAny = kNumThreads / 8;
  static constexpr bool kKnowsWhole = knows_whole_blocks<Spec>();
  static constexpr int kTileBits = kKnowsWhole ? 3 : 2;  // of a query tile (query_queue.cuh)
  static constexpr int kBytesFound =
      kTileBits * kBytesAny + kNumThreads * (Spec::kBlockKv / 16) * 4;
  static constexpr int kSmemBytes = kOffsetFound + (kHasBlockLists<Spec> ? kBytesFound : 0);
  static_assert(kSmemBytes == Spec::kSmemBytes, "host and device disagree on shared memory");

  // dQ sums are in fragment order if all sequences have one length: a tile is contiguous then, and
  // a warp adds to adjacent addresses. (notes/0006)
  static constexpr bool kDqInFragments =
      Spec::kQLayout == SeqLayout::kBatched && Spec::kKvLayout == SeqLayout::kBatched;
};

}  // namespace jitattn

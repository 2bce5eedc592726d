// Constants derived from the generated Spec, and checks that host and device agree.
#pragma once

#include "jitattn/attention/matrices.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/attention/softmax.cuh"
#include "jitattn/tile/accumulator.cuh"
#include "jitattn/tile/copy.cuh"
#include "jitattn/tile/mma/f16_acc.cuh"
#include "jitattn/tile/mma/f16_parts.cuh"
#include "jitattn/tile/mma/f32_acc.cuh"
#include "jitattn/tile/mma/int8.cuh"
#include "jitattn/tile/mma/split_p.cuh"
#include "jitattn/tile/mma/tf32.cuh"
#include "jitattn/tile/threads.cuh"
#include "jitattn/tile/two_level_accumulator.cuh"
#include "jitattn/tile/warp_rows.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Selects the MMA class of a numerics class.
template <Numerics kNumerics, Dtype kDtype>
struct MmaOf {
  using type = MmaF32Acc<kDtype>;
};
template <Dtype kDtype>
struct MmaOf<Numerics::kSplitP, kDtype> {
  using type = MmaSplitP<kDtype>;
};
template <Dtype kDtype>
struct MmaOf<Numerics::kF16Acc, kDtype> {
  static_assert(kDtype == Dtype::kFp16, "fp16 accumulators are for fp16 operands");
  using type = MmaF16Acc;
};
template <Dtype kDtype>
struct MmaOf<Numerics::kInt8, kDtype> {
  using type = MmaInt8<kDtype>;
};
template <Dtype kDtype>
struct MmaOf<Numerics::kInt8F16, kDtype> {
  using type = MmaInt8F16;
};
template <Dtype kDtype>
struct MmaOf<Numerics::kF16x3, kDtype> {
  using type = MmaF16Parts<3>;
};
template <Dtype kDtype>
struct MmaOf<Numerics::kF16x1, kDtype> {
  using type = MmaF16Parts<1>;
};
template <Dtype kDtype>
struct MmaOf<Numerics::kTf32x3, kDtype> {
  using type = MmaTf32<3>;
};
template <Dtype kDtype>
struct MmaOf<Numerics::kTf32, kDtype> {
  using type = MmaTf32<1>;
};

template <class Spec>
struct FwdTraits {
  static_assert(!kGathersKeys<Spec>, "the forward kernel takes lists");
  static_assert(Spec::kArch >= 80, "the forward kernel needs sm_80 or newer");
  static_assert(sizeof(FwdParamsOf<Spec>) == Spec::kParamsBytes,
                "host and device disagree on FwdParams");

  using Mma = typename MmaOf<Spec::kNumerics, Spec::kDtype>::type;
  using Element = typename Mma::Element;  // of V; of Q and K unless INT8
  using ElementQk = typename Conditional<kIsQuantized<Spec>, int8_t, Element>::type;
  static_assert(!kIsQuantized<Spec> || (!kHasBlockLists<Spec> && Spec::kHeadDim % 32 == 0 &&
                                        Spec::kAccess == Access::kVec16));
  using ElementOut = typename Conditional<Spec::kOutDtype == Dtype::kFp32, float, uint16_t>::type;

  static constexpr int kNumWarps = Spec::kWarpsQ * Spec::kWarpsKv;
  static constexpr int kNumThreads = 32 * kNumWarps;
  using Threads = CtaThreads<kNumThreads>;

  // Columns, padded to a multiple of 16 for the MMA.
  static constexpr int kDim = ceil_div(Spec::kHeadDim, 16) * 16;
  static constexpr int kDimV = ceil_div(Spec::kHeadDimV, 16) * 16;

  // Register tiles of a warp, in MMA tiles.
  static constexpr int kWarpRows = Spec::kBlockQ / Spec::kWarpsQ;
  static constexpr int kWarpKeys = Spec::kBlockKv / Spec::kWarpsKv;
  static constexpr int kJointRows = kWarpRows;  // each warp branches on its own
  using Rows = WarpRows<16>;
  __device__ static int first_row(int warp_q) { return warp_q * kWarpRows; }
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kKeyTiles = kWarpKeys / 8;
  static constexpr int kColumnTiles = kDimV / 8;
  using Softmax = OnlineSoftmax<kRowTiles, Mma::kMaxSlack, Mma::kLift>;
  static_assert(kWarpRows % 16 == 0 && kWarpRows * Spec::kWarpsQ == Spec::kBlockQ,
                "a warp owns a multiple of 16 rows");
  static_assert(kWarpKeys % 16 == 0 && kWarpKeys * Spec::kWarpsKv == Spec::kBlockKv,
                "a warp owns a multiple of 16 keys");

  using Scores = float[kRowTiles][kKeyTiles][4];  // [kWarpRows, kWarpKeys]

  // Accumulators of the output, with one level or two.
  static constexpr bool kIsTwoLevel = Spec::kNumerics == Numerics::kInt8F16;
  using OutputTile = typename Conditional<kIsTwoLevel, NarrowTile, WideTile>::type;
  using Output = OutputTile[kRowTiles][kColumnTiles];  // [kWarpRows, kDimV]
  using TwoLevel = typename Conditional<
      kIsTwoLevel, TwoLevelAccumulator<kRowTiles, kColumnTiles, Spec::kBlockKv, kNumThreads>,
      OneLevelAccumulator>::type;

  // INT8 Q stays in registers if it fits.
  static constexpr bool kHoldsQ =
      kIsQuantized<Spec> && kDim <= 128 &&
      (kIsTwoLevel ? Spec::kBlockKv <= (kDim > 64 ? 32 : 64) : Spec::kStages > 1 && !kHasGap<Spec>);
  using HeldQ = uint32_t[kHoldsQ ? kDim / 32 : 1][kRowTiles][4];

  // Elements of a row, and its 16-byte chunks in shared memory. Two parts are adjacent.
  static constexpr int kParts = Spec::kNumerics == Numerics::kF16x3 ? 2 : 1;
  static constexpr int kWidthQk = kParts * kDim, kWidthV = kParts * kDimV;
  static_assert(!kSplitFp32<Spec> || (kDim == Spec::kHeadDim && kDimV == Spec::kHeadDimV));
  static constexpr int kChunksQk = kWidthQk * sizeof(ElementQk) / 16;
  static constexpr int kChunksV = kWidthV * sizeof(Element) / 16;

  template <class T, int kRows, int kHeadDim, int kPaddedDim>
  using Copy = TileCopy<T, kRows, kHeadDim, kPaddedDim, kNumThreads, Spec::kAccess>;
  using CopyQ = Copy<ElementQk, Spec::kBlockQ, kParts * Spec::kHeadDim, kWidthQk>;
  using CopyK = Copy<ElementQk, Spec::kBlockKv, kParts * Spec::kHeadDim, kWidthQk>;
  using CopyV = Copy<Element, Spec::kBlockKv, kParts * Spec::kHeadDimV, kWidthV>;

  // Shared memory in bytes: Q, then the K buffers, then the V buffers. After the loop the same
  // space holds the partial results of the warps that split the keys, then the output tile. The
  // upper level of the accumulator overlaps Q if Q is held in registers; otherwise it follows.
  static constexpr int kBytesOfQ = Spec::kBlockQ * kWidthQk * sizeof(ElementQk);
  static constexpr int kOffsetTwoLevel = kHoldsQ ? 0 : kBytesOfQ;
  static constexpr int kBytesQ =
      kIsTwoLevel ? max_of(kBytesOfQ, kOffsetTwoLevel + TwoLevel::kBytes) : kBytesOfQ;
  static constexpr int kBytesK = Spec::kBlockKv * kWidthQk * sizeof(ElementQk);
  static constexpr int kBytesV = Spec::kBlockKv * kWidthV * sizeof(Element);
  static constexpr int kOffsetK = kBytesQ;
  static constexpr int kOffsetV = kOffsetK + Spec::kStages * kBytesK;
  static constexpr int kBytesLoop = kOffsetV + Spec::kStages * kBytesV;
  static constexpr bool kStagesOutput = true, kSumsAreDefined = true;
  static constexpr bool kAllWarpsWrite = false;
  static constexpr int kBytesOut =
      sizeof(ElementOut) == 2 ? Spec::kBlockQ * kDimV * static_cast<int>(sizeof(ElementOut)) : 0;
  static constexpr int kBytesCombine = (Spec::kWarpsKv - 1) * Spec::kBlockQ * (kDimV + 2) * 4;
  static constexpr int kBytesReused = max_of(kBytesLoop, max_of(kBytesOut, kBytesCombine));

  // After all that: the plan of a CTA where sequence lengths differ (schedule.cuh), a flag, and the
  // rows of the next gathered key blocks (gathered_rows.cuh).
  static constexpr bool kIsPaged = jitattn::kIsPaged<Spec>;
  static constexpr bool kIsGathered = kIsPaged || kHasBlockLists<Spec>;
  // INT8 K is never paged: only V is gathered then.
  static constexpr bool kGathersK = kIsGathered && !kIsQuantized<Spec>;
  // A thread copies rows that lie whole groups apart: 128 threads copy 16 rows at a time.
  static constexpr int kGroup = Spec::kKvLayout == SeqLayout::kPaged || kNumThreads < 128 ? 1 : 16;
  static constexpr int kGatherBatch = kGroup == 16 ? 8 : 4;
  static constexpr int kOffsetPlan = kBytesReused;
  static constexpr int kBytesPlan = 64;
  static constexpr int kOffsetFlag = kOffsetPlan + kBytesPlan - 4;
  static constexpr int kOffsetRows = kOffsetPlan + kBytesPlan;
  static constexpr int kBytesRows =
      kIsGathered ? 2 * kGatherBatch * (Spec::kBlockKv / kGroup) * 16 : 0;
  static constexpr int kOffsetListed = kOffsetRows + kBytesRows;
  static constexpr int kBytesListed =
      kHasBlockLists<Spec> ? 2 * kGatherBatch * (Spec::kBlockKv / 16) * 8 : 0;
  // Tiles of the bias and of a dense mask, as many buffers as of K.
  using Matrices = MatrixTraits<Spec>;
  static constexpr bool kStagesBias = Matrices::kStagesBias;
  static constexpr bool kStagesDense = Matrices::kStagesDense;
  static constexpr bool kIsStaged = kStagesBias || kStagesDense;
  using Bias = typename Matrices::Bias;
  using StagedBias = typename Matrices::StagedBias;
  using StagedDense = typename Matrices::StagedDense;
  static constexpr int kOffsetBias = kOffsetListed + kBytesListed;
  static constexpr int kBytesBias = kStagesBias ? StagedBias::kBytes : 0;
  static constexpr int kOffsetDense = kOffsetBias + Spec::kStages * kBytesBias;
  static constexpr int kBytesDense = kStagesDense ? StagedDense::kBytes : 0;
  static constexpr int kSmemBytes = kOffsetDense + Spec::kStages * kBytesDense;
  static_assert(kSmemBytes == Spec::kSmemBytes, "host and device disagree on shared memory");

  static_assert(swizzle_check::is_conflict_free<kChunksQk>() &&
                swizzle_check::is_bijection<kChunksQk>());
  static_assert(swizzle_check::is_conflict_free<kChunksV>() &&
                swizzle_check::is_bijection<kChunksV>());
};

}  // namespace jitattn

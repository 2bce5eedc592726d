// Constants derived from the generated Spec, and checks that host and device agree.
#pragma once

#include "jitattn/attention/matrices.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/attention/softmax.cuh"
#include "jitattn/fwd/sm90/gathered_blocks.cuh"
#include "jitattn/ptx/sm90/tma.cuh"
#include "jitattn/tile/some_threads.cuh"
#include "jitattn/tile/warp_rows.cuh"
#include "jitattn/tile/wgmma_operand.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Maps of Q [64 rows of as many heads as are packed], K and V [kBlockKv rows, or those of a piece] in
// pages of 64 columns.
struct FwdTensorMaps {
  ptx::TensorMap q;
  ptx::TensorMap k;
  ptx::TensorMap v;
};

// Named barriers of a CTA.
enum BarrierIdx : int {
  kStartBarrier,  // ptx::barrier_sync
  kConsumerBarrier,
  kTurnBarrier,                   // one for each consumer
  kOwnBarrier = kTurnBarrier + 3  // one for each consumer
};

// The plan of a tile, with its range: deriving that takes three loads, each after the other.
struct ListedPlan : CtaPlan {
  KvBlockRange range;
};

template <class Spec>
struct FwdSm90Traits {
  using Params = PersistentParams<FwdParamsOf<Spec>>;
  static_assert(sizeof(Params) == Spec::kParamsBytes, "host and device disagree on the parameters");
  static_assert(Spec::kArch == 90 && Spec::kAccess == Access::kVec16 &&
                Spec::kKvLayout != SeqLayout::kPaged && !kGathersKeys<Spec>);
  // fp32 operands come as fp16 parts: parts_consumer.cuh.
  static constexpr bool kIsInParts = kSplitFp32<Spec>;
  static_assert(kIsInParts ? Spec::kHeadDim % 16 == 0 && Spec::kHeadDimV % 16 == 0
                           : Spec::kNumerics == Numerics::kF32Acc && Spec::kDtype != Dtype::kFp32);
  static constexpr int kParts = Spec::kNumerics == Numerics::kF16x3 ? 2 : 1;

  // ---- Threads: a warpgroup that loads, and some that compute 64 rows each.
  static constexpr int kConsumers = Spec::kWarpsQ / 4;
  static constexpr int kNumThreads = 128 * (kConsumers + 1);
  static_assert(kNumThreads == Spec::kNumThreads && kConsumers * 64 == Spec::kBlockQ &&
                Spec::kWarpsKv == 1);
  static_assert(kConsumers == 2 || kConsumers == 3, "registers are shared out for so many");
  static_assert(Spec::kStages >= 2 && Spec::kBlockKv % 16 == 0, "K is a block ahead of V");
  static constexpr int kConsumerWarps = 4 * kConsumers;
  using Threads = SomeThreads<128, 128 * kConsumers, kConsumerBarrier>;
  // Registers of a thread: together at most 65536 in a CTA.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 224;

  // ---- Register tiles of a warp.
  static constexpr int kDim = ceil_div(Spec::kHeadDim, 16) * 16;
  static constexpr int kDimV = ceil_div(Spec::kHeadDimV, 16) * 16;
  static constexpr int kWarpRows = 16, kRowTiles = 1;
  static constexpr int kJointRows = 64;  // the warps of a warpgroup multiply together
  using Rows = WarpRows<16>;
  __device__ static int first_row(int warp_q) { return warp_q * kWarpRows; }
  static constexpr int kWarpKeys = Spec::kBlockKv;
  static constexpr int kKeyTiles = Spec::kBlockKv / 8;
  static constexpr int kColumnTiles = kDimV / 8;
  // As tile/mma/split_p.cuh: low parts of small weights must not underflow.
  using Softmax = OnlineSoftmax<kRowTiles, kParts == 2 ? 1 : 8, kParts == 2 ? 14 : 0>;
  using Scores = float[kRowTiles][kKeyTiles][4];
  using Output = float[kRowTiles][kColumnTiles][4];
  using Weights = uint32_t[Spec::kBlockKv / 16][4];  // P, as operands
  static constexpr bool kIsTwoLevel = false;

  // ---- Shared memory in bytes: Q stages, with 64 rows for each consumer; K stages; V stages; plans
  // of tiles; list entries; space to merge splits; barriers.
  static constexpr bool kStagesOutput = false, kSumsAreDefined = false;
  static constexpr bool kAllWarpsWrite = true;
  // Each part of a row begins a page.
  static constexpr int kPagesOfQk = ceil_div(kDim, kPageColumns);
  static constexpr int kPagesOfV = ceil_div(kDimV, kPageColumns);
  static constexpr int kPagesQk = kParts * kPagesOfQk, kPagesV = kParts * kPagesOfV;
  static constexpr int kBytesQPage = 64 * kPageRowBytes;
  static constexpr int kBytesConsumer = kPagesQk * kBytesQPage;  // Q of one consumer
  static constexpr int kBytesQ = kConsumers * kBytesConsumer;
  static constexpr int kBytesPage = Spec::kBlockKv * kPageRowBytes;
  static constexpr int kBytesK = kPagesQk * kBytesPage, kBytesV = kPagesV * kBytesPage;
  static constexpr int kOffsetK = Spec::kQStages * kBytesQ;
  static constexpr int kOffsetV = kOffsetK + Spec::kStages * kBytesK;
  static constexpr int kOffsetPlans = kOffsetV + Spec::kStages * kBytesV;
  using Plan = typename Conditional<kHasBlockLists<Spec>, ListedPlan, CtaPlan>::type;
  static constexpr int kBytesPlan = kHasBlockLists<Spec> ? 128 : 64;
  static_assert(sizeof(Plan) <= kBytesPlan);
  // Of a tile more than of Q, which consumers finish with before; behind these, the producer's next.
  static constexpr int kPlans = Spec::kQStages + 1;
  static constexpr int kOffsetListed = kOffsetPlans + (kPlans + 1) * kBytesPlan;
  static constexpr int kBytesListed = Spec::kBlockKv / 16 * 8;  // of a block
  static constexpr int kOffsetMerge =
      kOffsetListed + (kHasBlockLists<Spec> ? kListedBlocks<Spec> * kBytesListed : 0);
  static constexpr int kBytesReused = Spec::kBlockQ * 8;  // attention/split_combine.cuh
  static constexpr int kOffsetFlag = kBytesReused;        // from kOffsetMerge on
  static constexpr int kOffsetBarriers = kOffsetMerge + kBytesReused + 8;
  static constexpr int kNumBarriers = 2 * Spec::kQStages + 4 * Spec::kStages;
  static constexpr int kSmemBytes = kOffsetBarriers + kNumBarriers * 8;
  static_assert(kSmemBytes == Spec::kSmemBytes, "host and device disagree on shared memory");

  // ---- Parts that this family does without.
  static constexpr bool kStagesBias = false, kStagesDense = false, kIsStaged = false;
  static_assert(!MatrixTraits<Spec>::kStagesBias && !MatrixTraits<Spec>::kStagesDense);
};

}  // namespace jitattn

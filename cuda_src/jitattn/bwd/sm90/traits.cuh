// Constants derived from the generated Spec, and checks that host and device agree.
#pragma once

#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/ptx/sm90/tma.cuh"
#include "jitattn/tile/wgmma_operand.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Maps of Q and dO [kBlockQ rows], and of K and V [kBlockKv rows], in pages of 64 columns.
struct BwdTensorMaps {
  ptx::TensorMap q;
  ptx::TensorMap k;
  ptx::TensorMap v;
  ptx::TensorMap d_out;
};

// Named barriers of a CTA.
enum BwdBarrierIdx : int {
  kBwdStartBarrier,  // ptx::barrier_sync
  kKeyGroupsBarrier,
  kOwnKeysBarrier  // one for each key group
};

template <class Spec>
struct BwdSm90Traits {
  using Params = BwdSm90Params<BwdParamsOf<Spec>>;
  static_assert(sizeof(Params) == Spec::kParamsBytes, "host and device disagree on the parameters");
  static_assert(Spec::kArch == 90 && Spec::kAccess == Access::kVec16 &&
                Spec::kDtype != Dtype::kFp32 && Spec::kNumerics == Numerics::kF32Acc);

  // ---- Threads: a warpgroup that copies and computes dQ, and two that own 64 keys each.
  static constexpr int kKeyGroups = 2;
  static constexpr int kNumThreads = 128 * (kKeyGroups + 1);
  static_assert(kNumThreads == Spec::kNumThreads && Spec::kBlockKv == 64 * kKeyGroups);
  static constexpr int kKeyWarps = 4 * kKeyGroups;
  // Registers of a thread: together at most 504 of the three warpgroups, as many as they begin with.
  static constexpr int kDqRegisters = Spec::kPieceColumns == 64 ? 72 : 56;
  static constexpr int kKeyRegisters = Spec::kPieceColumns == 64 ? 216 : 224;
  static_assert(kDqRegisters + kKeyGroups * kKeyRegisters <= 504);

  // ---- Tiles
  static constexpr bool kIsBf16 = Spec::kDtype == Dtype::kBf16;
  static constexpr int kDim = ceil_div(Spec::kHeadDim, 16) * 16;
  static constexpr int kDimV = ceil_div(Spec::kHeadDimV, 16) * 16;
  static_assert(Spec::kBlockQ % 64 == 0 && kDim <= 128 && kDimV <= 128);
  static constexpr int kQueryPages = Spec::kBlockQ / 64;  // of dS^T [kBlockKv, kBlockQ]
  // dQ is computed in pieces of 64 queries and kPieceColumns columns; the last one may be narrower.
  static constexpr int kPiecesAcross = ceil_div(kDim, Spec::kPieceColumns);
  static constexpr int kPieces = kQueryPages * kPiecesAcross;
  static constexpr bool kDqInFragments =
      Spec::kQLayout == SeqLayout::kBatched && Spec::kKvLayout == SeqLayout::kBatched;
  static constexpr bool kIsDeterministic = Spec::kDeterministic == Switch::kOn;

  // ---- Shared memory in bytes: K, V, stages of Q and of dO, slots of dS, pieces of dQ on their way
  // to memory, LSE and delta of each stage's rows, with the matrices that multiply them, barriers.
  static constexpr int kStages = 3;
  static constexpr int kSlots = 2;
  static constexpr int kPagesQk = ceil_div(kDim, kPageColumns);
  static constexpr int kPagesV = ceil_div(kDimV, kPageColumns);
  static constexpr int kBytesKeyPage = Spec::kBlockKv * kPageRowBytes;
  static constexpr int kBytesQueryPage = Spec::kBlockQ * kPageRowBytes;
  static constexpr int kBytesQ = kPagesQk * kBytesQueryPage, kBytesDo = kPagesV * kBytesQueryPage;
  static constexpr int kBytesDs = kQueryPages * kBytesKeyPage;
  static constexpr int kBytesPiece = 64 * Spec::kPieceColumns * 4;
  // Every step begins with the first buffer.
  static constexpr int kPieceBuffers = !kDqInFragments ? 0 : kPieces % 2 == 0 ? 2 : 1;
  // Either a row of LSE and one of delta, or a matrix [kBlockQ, 16]: stat_operands.cuh.
  static constexpr bool kStatsByMma = Spec::kStatsByMma == Switch::kOn;
  static constexpr int kBytesStat = Spec::kBlockQ * 4;
  static constexpr int kBytesStats = kStatsByMma ? Spec::kBlockQ * 32 : 2 * kBytesStat;
  static constexpr int kBytesOnes = 64 * 32;
  static constexpr int kOffsetV = kPagesQk * kBytesKeyPage;
  static constexpr int kOffsetQ = kOffsetV + kPagesV * kBytesKeyPage;
  static constexpr int kOffsetDo = kOffsetQ + kStages * kBytesQ;
  static constexpr int kOffsetDs = kOffsetDo + kStages * kBytesDo;
  static constexpr int kOffsetPieces = kOffsetDs + kSlots * kBytesDs;
  static constexpr int kOffsetStats = kOffsetPieces + kPieceBuffers * kBytesPiece;
  static constexpr int kOffsetOnes = kOffsetStats + kStages * kBytesStats;
  static constexpr int kOffsetBarriers = kOffsetOnes + (kStatsByMma ? 2 * kBytesOnes : 0);
  static constexpr int kNumBarriers = 1 + 2 * kStages + 2 * kSlots;
  static constexpr int kSmemBytes = kOffsetBarriers + kNumBarriers * 8;
  static_assert(kSmemBytes == Spec::kSmemBytes, "host and device disagree on shared memory");
};

}  // namespace jitattn

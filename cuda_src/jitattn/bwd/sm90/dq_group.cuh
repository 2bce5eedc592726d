// The warpgroup that copies operands and computes dQ = dS K of each step.
#pragma once

#include "jitattn/bwd/sm90/dq_turn.cuh"
#include "jitattn/bwd/sm90/operand_copies.cuh"
#include "jitattn/bwd/sm90/pipeline.cuh"
#include "jitattn/bwd/sm90/stat_operands.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/bwd/sm90/work.cuh"
#include "jitattn/ptx/global.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/sm90/elected.cuh"
#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/ptx/sm90/wgmma_transposed.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/ring.cuh"
#include "jitattn/tile/warpgroup.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct BwdDqGroup {
  using Traits = BwdSm90Traits<Spec>;
  using Work = BwdSm90Work<Spec>;
  using Turn = DqTurn<Spec>;
  static constexpr int kStages = Traits::kStages;

  const Work& work;
  const BwdOperandCopies<Spec> copies;
  const BwdBarriers<Spec> barriers;
  const uint32_t s_addr;
  const int warp_idx;  // the same in all lanes, as the compiler is told
  const int lane_idx;

  __device__ BwdDqGroup(const BwdTensorMaps& maps, const Work& work, uint32_t s_addr)
      : work(work),
        copies{maps, work, BwdBarriers<Spec>(s_addr), s_addr},
        barriers(s_addr),
        s_addr(s_addr),
        warp_idx(uniform(threadIdx.x / 32)),
        lane_idx(threadIdx.x % 32) {}

  // Copies run two steps ahead: those of step i + 2 begin when dS of step i is written.
  __device__ __forceinline__ void run() {
    const int num_steps = work.num_steps();
    QueryStep step = work.first_step(), ahead = step, of_stats = step;
    RowStatistics<Spec> stats;
    stats.seek(work, of_stats);
    if (num_steps == 0) return;
    if (warp_idx == 0) copies.load_k();
#pragma unroll 1
    for (int i = 0; i < min_of(kStages - 1, num_steps); ++i) {
      stats.load(work, of_stats);
      load(ahead, i, i == 0);
      stats.store(work, s_addr, barriers, i);
    }
    if (kStages - 1 < num_steps) stats.load(work, of_stats);
    ptx::mbarrier_wait(barriers.k_full(), 0);
    float* g_dq = sums_of(step);
    Turn turn = {work.params};
    Ring<Traits::kSlots> slot = {0, 0};
    int stage = kStages - 1;  // of the step to be loaded
#pragma unroll 1
    for (int i = 0; i < num_steps; ++i) {
      // New numbers for the compiler: descriptors of K and distances of rows are not kept from step
      // to step.
      const Fresh fresh = {static_cast<uint32_t>(uniform(s_addr)),
                           uniform(static_cast<int>(work.params.dq_stride_row))};
      if constexpr (Traits::kIsDeterministic) turn.look(work, step);
      ptx::mbarrier_wait(barriers.ds_full(slot.stage), slot.parity);
      if (i + kStages - 1 < num_steps) {
        load(ahead, stage, false);
        stats.store(work, s_addr, barriers, stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
        if (i + kStages < num_steps) stats.load(work, of_stats);
      }
      add_dq(step, g_dq, fresh, slot.stage, turn);
      g_dq += stride_of_sums();
      if (work.advance(step)) g_dq = sums_of(step);
      slot.advance();
    }
    if constexpr (Traits::kIsDeterministic) turn.pass();
    if constexpr (Traits::kDqInFragments) ptx::bulk_wait_read<0>();
  }

 private:
  struct Fresh {
    uint32_t s_k;
    int row_stride;  // of the sums, where they are like q
  };

  // Copies Q and dO of a step, with V if it is the first, and goes on to the next.
  __device__ __forceinline__ void load(QueryStep& step, int stage, bool is_first) const {
    if (warp_idx == 0) {
      copies.load_q(step, stage);
      if (is_first) copies.load_v();
      copies.load_d_out(step, stage, is_first);
    }
    work.advance(step);
  }

  // Returns this warp's part of a tile's sums. In fragment order a block of 64 queries is [4 warps]
  // [kDim / 8 column tiles][32 lanes][4], as bwd_postprocess reads it; else it is this lane's part.
  __device__ __forceinline__ float* sums_of(const QueryStep& step) const {
    const auto& params = work.params;
    float* g_head = params.dq_sum + work.own.batch * params.dq_stride_batch +
                    (work.first_head() + step.head) * params.dq_stride_head;
    const int64_t first_row = step.tile * Spec::kBlockQ;
    if constexpr (Traits::kDqInFragments) {
      return g_head + first_row * Traits::kDim + warp_idx * (Traits::kDim * 16);
    }
    const int64_t row =
        work.sequence.q_start + first_row + warp_idx * 16 + accumulator_row(lane_idx, 0);
    return g_head + row * params.dq_stride_row + accumulator_column(lane_idx);
  }
  // Returns the distance to the part of the next tile.
  __device__ int64_t stride_of_sums() const {
    return Spec::kBlockQ *
           (Traits::kDqInFragments ? int64_t{Traits::kDim} : work.params.dq_stride_row);
  }

  __device__ __forceinline__ void add_dq(const QueryStep& step, float* g_dq, const Fresh& fresh,
                                         int slot, Turn& turn) const {
#pragma unroll
    for (int piece = 0; piece < Traits::kPieces; ++piece) {
      // The widths of pieces are constants after unrolling.
      constexpr int kLast = Traits::kDim - (Traits::kPiecesAcross - 1) * Spec::kPieceColumns;
      if (kLast != Spec::kPieceColumns &&
          piece % Traits::kPiecesAcross == Traits::kPiecesAcross - 1) {
        add_piece<kLast>(step, g_dq, fresh, piece, slot, turn);
      } else {
        add_piece<Spec::kPieceColumns>(step, g_dq, fresh, piece, slot, turn);
      }
    }
  }

  // Computes a piece, 64 queries x kColumns, and adds it to the sums.
  template <int kColumns>
  __device__ __forceinline__ void add_piece(const QueryStep& step, float* g_dq, const Fresh& fresh,
                                            int piece, int slot, Turn& turn) const {
    const int page = piece / Traits::kPiecesAcross;
    const int column = piece % Traits::kPiecesAcross * Spec::kPieceColumns;
    float r_dq[kColumns / 2];
    const WgmmaDescriptor ds(
        s_addr + Traits::kOffsetDs + slot * Traits::kBytesDs + page * Traits::kBytesKeyPage,
        Traits::kBytesKeyPage);
    const WgmmaDescriptor k(
        fresh.s_k + column / kPageColumns * Traits::kBytesKeyPage + column % kPageColumns * 2,
        Traits::kBytesKeyPage);
    ptx::wgmma_fence();
    ptx::wgmma_transposed<Traits::kIsBf16, kColumns, false>(r_dq, ds.at_rows(0), k.at_rows(0));
#pragma unroll
    for (int i = 1; i < Spec::kBlockKv / 16; ++i) {
      ptx::wgmma_transposed<Traits::kIsBf16, kColumns, true>(r_dq, ds.at_rows(i), k.at_rows(i));
    }
    ptx::wgmma_commit();
    ptx::wgmma_hold(r_dq);
    if constexpr (Traits::kIsDeterministic) {
      if (piece == 0) turn.pass();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(r_dq);
    if (piece == Traits::kPieces - 1) ptx::mbarrier_arrive_elected(barriers.ds_empty(slot));
    if constexpr (Traits::kIsDeterministic) {
      if (piece == 0) turn.take();
    }
    if constexpr (Traits::kDqInFragments) {
      add_in_bulk<kColumns>(r_dq, g_dq + page * (64 * Traits::kDim) + column * 16, piece);
    } else {
      add_by_rows<kColumns>(r_dq, step.tile, g_dq, fresh.row_stride, page, column);
    }
  }

  // Adds a warp's part of a piece, which is contiguous in the sums.
  template <int kColumns>
  __device__ __forceinline__ void add_in_bulk(const float (&r_dq)[kColumns / 2], float* g_part,
                                              int piece) const {
    constexpr int kBuffers = Traits::kPieceBuffers, kTileBytes = 512;
    const uint32_t s_part = s_addr + Traits::kOffsetPieces +
                            piece % kBuffers * Traits::kBytesPiece +
                            warp_idx * (Traits::kBytesPiece / 4);
    ptx::bulk_wait_read<kBuffers - 1>();
    __syncwarp();  // the lane that copied has waited
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      Vec16 quad;
#pragma unroll
      for (int i = 0; i < 4; ++i) quad.word[i] = __float_as_uint(r_dq[n * 4 + i]);
      ptx::st_shared_v4(s_part + n * kTileBytes + lane_idx * 16, quad);
    }
    ptx::fence_proxy_async();
    __syncwarp();
    ptx::bulk_reduce_add_elected(g_part, s_part, kColumns / 8 * kTileBytes);
    ptx::bulk_commit();
  }

  // Adds rows to sums like q: sequences begin anywhere.
  template <int kColumns>
  __device__ __forceinline__ void add_by_rows(const float (&r_dq)[kColumns / 2], int tile,
                                              float* g_dq, int row_stride, int page,
                                              int column) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = page * 64 + half * 8;  // from this lane's first one
      const int end = work.sequence.len_q - tile * Spec::kBlockQ - warp_idx * 16;
      if (row + accumulator_row(lane_idx, 0) >= end) continue;
      float* g_row = g_dq + static_cast<int64_t>(row) * row_stride + column;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        if (column + n * 8 < Spec::kHeadDim) {
          ptx::red_add_v2(g_row + n * 8, r_dq[n * 4 + half * 2], r_dq[n * 4 + half * 2 + 1]);
        }
      }
    }
  }
};

}  // namespace jitattn

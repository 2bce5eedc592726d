// A warpgroup that owns 64 keys: computes S^T and dP^T of each step, from which come dV and dK, which
// stay in its registers, and dS^T, which it passes on in shared memory.
//
// Order of a step, where bars are waits. Products that are not waited for run on beside exponentials,
// and so do those of the other warpgroups.
//   kOverlaps   S dP | exp(S) | dS, dV  dS stored, dK |      (both sums are held at a time)
//   otherwise   S | exp(S), dV dP | dS  dS stored, dK |
#pragma once

#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm90/key_gradients.cuh"
#include "jitattn/bwd/sm90/pipeline.cuh"
#include "jitattn/bwd/sm90/row_intervals.cuh"
#include "jitattn/bwd/sm90/stat_operands.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/bwd/sm90/work.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/sm90/elected.cuh"
#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/ptx/sm90/stmatrix.cuh"
#include "jitattn/ptx/sm90/warpgroup.cuh"
#include "jitattn/ptx/sm90/wgmma.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/tile/ring.cuh"
#include "jitattn/tile/warpgroup.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct BwdKeyGroup {
  using Traits = BwdSm90Traits<Spec>;
  using Params = typename Traits::Params;
  using Work = BwdSm90Work<Spec>;
  using Scores = float[Spec::kBlockQ / 2];          // [64 keys, kBlockQ] of a warpgroup
  using Operand = uint32_t[Spec::kBlockQ / 16][4];  // the same, rounded
  static constexpr bool kIsBf16 = Traits::kIsBf16;
  // Whether tiles that the other warpgroup's keys are seen by may not see its own.
  static constexpr bool kMaySkip = Spec::kMask != MaskKind::kFull;
  static constexpr bool kOverlaps = Spec::kOverlaps == Switch::kOn;

  const Params& params;
  const Work& work;
  const BwdBarriers<Spec> barriers;
  const uint32_t s_addr;
  const int group;
  const int first_key;         // of this warpgroup
  const TileRange seen, free;  // tiles of which any row sees any of its keys; all rows all keys
  const int lane_idx;
  uint32_t hidden_keys = 0;  // of this lane, by a tensor: a bit for each
  Ring<Traits::kStages> ring;
  Ring<Traits::kSlots> slot;
  float r_dk[1][Traits::kDim / 8][4];
  float r_dv[1][Traits::kDimV / 8][4];
  Operand r_p, r_ds;

  __device__ BwdKeyGroup(const Params& params, const Work& work, uint32_t s_addr, int group)
      : params(params),
        work(work),
        barriers(s_addr),
        s_addr(s_addr),
        group(group),
        first_key(work.first_key + group * 64),
        seen(tiles_that_see_any<Spec>(params, work.sequence, work.first_head(), first_key, 64)),
        free(tiles_that_see_all<Spec>(params, work.sequence, work.first_head(), first_key, 64)),
        lane_idx(threadIdx.x % 32),
        ring{0, 0},
        slot{0, 1} {}

  __device__ __forceinline__ void run() {
    clear(flat(r_dk));
    clear(flat(r_dv));
    if constexpr (Spec::kKeyPadding == Switch::kOn) find_hidden_keys();
    const int num_steps = work.num_steps();
    if (num_steps > 0) {
      ptx::mbarrier_wait(barriers.k_full(), 0);
      if constexpr (Spec::kKvLayout == SeqLayout::kRagged) clear_missing_keys();
    }
    QueryStep query = work.first_step();
#pragma unroll 1
    for (int i = 0; i < num_steps; ++i) {
      if (!kMaySkip || seen.has(query.tile)) {
        step(query);
      } else {
        skip(query);
      }
      work.advance(query);
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(flat(r_dv));
    ptx::wgmma_hold(flat(r_dk));
    KeyGradients<Spec>{params, s_addr, group, lane_idx}.store(r_dk, r_dv);
  }

 private:
  __device__ __forceinline__ void step(const QueryStep& query) {
    Scores r_s, r_dp;
    ptx::mbarrier_wait(barriers.q_full(ring.stage), ring.parity);
    if constexpr (Spec::kQLayout == SeqLayout::kRagged) clear_missing_rows(query);
    // What the step before began, dV and dK, ends before its operands' registers are needed.
    ptx::wgmma_wait<1>();
    ptx::wgmma_hold(flat(r_dv));
    ptx::wgmma_hold(r_p);
    set_product<Traits::kDim>(r_s, key_rows(0), query_rows(Traits::kOffsetQ, Traits::kBytesQ),
                              kLseOperand);
    ptx::wgmma_wait<1>();
    ptx::wgmma_hold(flat(r_dk));
    ptx::wgmma_hold(r_ds);
    if constexpr (kOverlaps) {
      set_d_p(r_dp);
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(r_s);
      weigh(r_s, query);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_dp);
      derive(r_s, r_dp);
      ptx::wgmma_hold(r_ds);
      round(r_p, r_s);
      ptx::wgmma_hold(r_p);
      add_d_v();
    } else {
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_s);
      weigh(r_s, query);
      round(r_p, r_s);
      ptx::mbarrier_wait(barriers.d_out_full(ring.stage), ring.parity);
      add_d_v();
      set_d_p(r_dp);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_dp);
      ptx::wgmma_hold(flat(r_dv));
      derive(r_s, r_dp);
    }
    pass_on();
    add_columns<Traits::kDim>(r_dk, r_ds, query_columns(Traits::kOffsetQ, Traits::kBytesQ));
    ring.advance();
    slot.advance();
  }

  // Passes on gradients of 0 for a tile that sees none of the keys.
  __device__ __forceinline__ void skip(const QueryStep& query) {
    // Nobody else may wait for these copies, and the other warpgroup for this one.
    ptx::mbarrier_wait(barriers.q_full(ring.stage), ring.parity);
    ptx::mbarrier_wait(barriers.d_out_full(ring.stage), ring.parity);
    if constexpr (Spec::kQLayout == SeqLayout::kRagged) clear_missing_rows(query);
    ptx::wgmma_wait<0>();  // the stage of the step before is read
    ptx::wgmma_hold(flat(r_dv));
    ptx::wgmma_hold(flat(r_dk));
#pragma unroll
    for (int i = 0; i < Spec::kBlockQ / 4; ++i) r_ds[i / 4][i % 4] = 0;
    pass_on();
    ring.advance();
    slot.advance();
  }

  // ---- Operands in shared memory
  __device__ WgmmaDescriptor key_rows(int offset) const {
    return WgmmaDescriptor(s_addr + offset + group * (64 * kPageRowBytes), 0);
  }
  __device__ WgmmaDescriptor query_rows(int offset, int bytes) const {
    return WgmmaDescriptor(s_addr + offset + ring.stage * bytes, 0);
  }
  // Of a product that sums over rows.
  __device__ WgmmaDescriptor query_columns(int offset, int bytes) const {
    return WgmmaDescriptor(s_addr + offset + ring.stage * bytes, Traits::kBytesQueryPage);
  }

  // ---- Products
  // r = A B^T, of this warpgroup's keys and the step's rows; with kStatsByMma, that less LSE / scale
  // or delta of the row
  template <int kColumns>
  __device__ __forceinline__ void set_product(Scores& r, const WgmmaDescriptor& keys,
                                              const WgmmaDescriptor& rows,
                                              StatOperand operand) const {
    constexpr int kRows = Spec::kBlockQ, kKeys = Spec::kBlockKv;
    ptx::wgmma_fence();
    if constexpr (Traits::kStatsByMma) {
      const uint32_t s_ones = s_addr + Traits::kOffsetOnes + operand * Traits::kBytesOnes;
      const uint32_t s_stage = s_addr + Traits::kOffsetStats + ring.stage * Traits::kBytesStats;
      ptx::wgmma_rows<true, kRows, false>(r, stat_descriptor(s_ones), stat_descriptor(s_stage));
    }
    ptx::wgmma_rows<kIsBf16, kRows, Traits::kStatsByMma>(r, keys.template at_columns<kKeys>(0),
                                                         rows.template at_columns<kRows>(0));
#pragma unroll
    for (int d = 1; d < kColumns / 16; ++d) {
      ptx::wgmma_rows<kIsBf16, kRows, true>(r, keys.template at_columns<kKeys>(d),
                                            rows.template at_columns<kRows>(d));
    }
    ptx::wgmma_commit();
    ptx::wgmma_hold(r);
  }
  __device__ __forceinline__ void set_d_p(Scores& r_dp) const {
    ptx::mbarrier_wait(barriers.d_out_full(ring.stage), ring.parity);
    set_product<Traits::kDimV>(r_dp, key_rows(Traits::kOffsetV),
                               query_rows(Traits::kOffsetDo, Traits::kBytesDo), kDeltaOperand);
  }
  // r += A B, of weights or their gradients and the step's rows
  template <int kColumns, int kTiles>
  __device__ __forceinline__ static void add_columns(float (&r)[1][kTiles][4], const Operand& a,
                                                     const WgmmaDescriptor& rows) {
    ptx::wgmma_hold(flat(r));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Spec::kBlockQ / 16; ++step) {
      ptx::wgmma_columns<kIsBf16, kColumns>(flat(r), a[step], rows.at_rows(step));
    }
    ptx::wgmma_commit();
    ptx::wgmma_hold(flat(r));
  }
  __device__ __forceinline__ void add_d_v() {
    add_columns<Traits::kDimV>(r_dv, r_p, query_columns(Traits::kOffsetDo, Traits::kBytesDo));
  }

  // ---- Weights and their gradients
  // r_s = exp2(r_s * scale_log2 - LSE), 0 where a key is hidden
  __device__ __forceinline__ void weigh(Scores& r_s, const QueryStep& query) const {
    if (!free.has(query.tile) || hidden_keys != 0) {
      hide_rows<Spec>(r_s, own_rows().of, query.tile * Spec::kBlockQ, lane_idx);
    }
#pragma unroll
    for (int n = 0; n < Spec::kBlockQ / 8; ++n) {
      float neg_lse[2] = {0.f, 0.f};
      if constexpr (!Traits::kStatsByMma) {
        Scalar<Dtype::kFp32>::load_pair_shared(neg_lse, s_stats() + n * 32);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = r_s[n * 4 + i];
        score = Traits::kStatsByMma ? score * params.scale_log2
                                    : fmaf(score, params.scale_log2, neg_lse[i % 2]);
        score = ptx::exp2_approx(score);
      }
    }
  }
  // r_ds = P (dP - delta), rounded
  __device__ __forceinline__ void derive(const Scores& r_weights, Scores& r_dp) {
#pragma unroll
    for (int n = 0; n < Spec::kBlockQ / 8; ++n) {
      float delta[2] = {0.f, 0.f};
      if constexpr (!Traits::kStatsByMma) {
        Scalar<Dtype::kFp32>::load_pair_shared(delta, s_stats() + Traits::kBytesStat + n * 32);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float d_p = r_dp[n * 4 + i];
        r_dp[n * 4 + i] = r_weights[n * 4 + i] * (Traits::kStatsByMma ? d_p : d_p - delta[i % 2]);
      }
    }
    round(r_ds, r_dp);
  }
  // Statistics of this lane's first row in the stage.
  __device__ uint32_t s_stats() const {
    return s_addr + Traits::kOffsetStats + ring.stage * Traits::kBytesStats +
           accumulator_column(lane_idx) * 4;
  }
  // Rounds accumulators: those of two n8 tiles are the operand of 16 rows.
  __device__ __forceinline__ static void round(Operand& to, const Scores& r) {
#pragma unroll
    for (int step = 0; step < Spec::kBlockQ / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[step][i] =
            Scalar<Spec::kDtype>::round_pair(r[step * 8 + i * 2], r[step * 8 + i * 2 + 1]);
      }
    }
  }

  // Rows that see this lane's two keys.
  struct OwnRows {
    RowInterval of[2];
  };
  __device__ __forceinline__ OwnRows own_rows() const {
    OwnRows rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = own_key(half);
      rows.of[half] = rows_that_see<Spec>(params, work.sequence, work.first_head(), key);
      if ((hidden_keys >> half & 1) != 0) rows.of[half] = {kNoRow, kNoRow};
    }
    return rows;
  }
  __device__ int own_key(int half) const {
    return first_key + warp_in_group() * 16 + accumulator_row(lane_idx, half);
  }
  __device__ __forceinline__ void find_hidden_keys() {
    const uint8_t* g_padding = params.key_padding + work.own.batch * params.key_padding_stride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = own_key(half);
      const bool is_kept = key >= work.sequence.len_kv || __ldg(g_padding + key) != 0;
      hidden_keys |= is_kept ? 0u : 1u << half;
    }
  }
  __device__ static int warp_in_group() { return static_cast<int>(threadIdx.x) / 32 % 4; }

  // Stores dS^T of a step, [64 keys, kBlockQ] in pages of 64 rows, for dQ.
  __device__ __forceinline__ void pass_on() const {
    const int key = group * 64 + warp_in_group() * 16 + lane_idx % 16;
    const uint32_t s_key =
        s_addr + Traits::kOffsetDs + slot.stage * Traits::kBytesDs + key * kPageRowBytes;
    ptx::mbarrier_wait(barriers.ds_empty(slot.stage), slot.parity);
#pragma unroll
    for (int step = 0; step < Spec::kBlockQ / 16; ++step) {
      const int chunk = (step % 4 * 2 + lane_idx / 16) ^ key % 8;
      ptx::stmatrix_x4(s_key + step / 4 * Traits::kBytesKeyPage + chunk * 16, r_ds[step]);
    }
    ptx::fence_proxy_async();
    __syncwarp();
    ptx::mbarrier_arrive_elected(barriers.ds_full(slot.stage));
  }

  // ---- Sequences that lie one after another: what follows may be of another one, or not a number.
  __device__ __forceinline__ void clear_missing_keys() const {
    const int end = work.num_keys - group * 64;
    if (end >= 64) return;
    ptx::mbarrier_wait(barriers.d_out_full(0), 0);  // and V is there
    const uint32_t thread_idx = threadIdx.x % 128, s_own = s_addr + group * (64 * kPageRowBytes);
    clear_rows<64, 128, Traits::kPagesQk, Spec::kBlockKv>(s_own, thread_idx, 0, end);
    clear_rows<64, 128, Traits::kPagesV, Spec::kBlockKv>(s_own + Traits::kOffsetV, thread_idx, 0,
                                                         end);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kOwnKeysBarrier + group, 128);
  }
  // Both warpgroups clear, and wait for each other.
  __device__ __forceinline__ void clear_missing_rows(const QueryStep& query) {
    const int end = work.sequence.len_q - query.tile * Spec::kBlockQ;
    if (end >= Spec::kBlockQ) return;
    ptx::mbarrier_wait(barriers.d_out_full(ring.stage), ring.parity);
    const uint32_t thread_idx = threadIdx.x - 128;
    clear_rows<Spec::kBlockQ, 256, Traits::kPagesQk>(
        s_addr + Traits::kOffsetQ + ring.stage * Traits::kBytesQ, thread_idx, 0, end);
    clear_rows<Spec::kBlockQ, 256, Traits::kPagesV>(
        s_addr + Traits::kOffsetDo + ring.stage * Traits::kBytesDo, thread_idx, 0, end);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kKeyGroupsBarrier, 256);
  }

  template <int kCount>
  __device__ __forceinline__ static void clear(float (&r)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) r[i] = 0.f;
  }
};

}  // namespace jitattn

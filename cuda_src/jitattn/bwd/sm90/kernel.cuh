// Kernel      Gradients of q, k and v on wgmma and TMA: sm_90.
//
// Math        As of the mma.sync family (bwd/sm80/kernel.cuh), with the same sums of dQ, parts of dK
//             and dV, and statistics of rows.
//
// Paper       Dao, FlashAttention-2, arXiv:2307.08691, Algorithm 2; Shah et al., FlashAttention-3,
//             arXiv:2407.08608, for the roles of warpgroups. We differ in: P and dS are transposed,
//             [keys, rows], so that they stay in the registers of the warpgroup that owns the keys,
//             as operands of dV and dK; dQ is computed by the warpgroup that copies.
//
// Work split  One CTA: 128 keys of one kv head, and all query tiles that see them, or one of
//             num_q_splits parts of these, of all query heads (work.cuh). Warpgroup 0 copies
//             (operand_copies.cuh) and computes dQ (dq_group.cuh); warpgroups 1 and 2 own 64 keys
//             each (key_group.cuh), and do not wait for each other.
//
// Shared      K, V for the whole run; three stages of Q, dO, LSE and delta; two slots of dS^T; pieces
// memory      of dQ. In pages of 64 columns (tile/wgmma_operand.cuh).
//
// Pipeline    step i of the keys  | S dP -> P dS | dS stored  dV dK |
//             step i of dQ                       | copies of i + 2, dQ = dS K, added to the sums |
//
// dQ          Added to the sums in global memory: by bulk copies of pieces in fragment order, or row
//             by row where sequences begin anywhere; with kDeterministic in key order.
#pragma once

#include "jitattn/bwd/sm90/dq_group.cuh"
#include "jitattn/bwd/sm90/key_group.cuh"
#include "jitattn/bwd/sm90/pipeline.cuh"
#include "jitattn/bwd/sm90/stat_operands.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/bwd/sm90/work.cuh"
#include "jitattn/debug.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/sm90/tma.cuh"
#include "jitattn/ptx/sm90/warpgroup.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void attn_bwd_sm90(const BwdTensorMaps& maps,
                                              const typename BwdSm90Traits<Spec>::Params& params) {
  using Traits = BwdSm90Traits<Spec>;
  extern __shared__ __align__(1024) unsigned char s_storage[];
  const uint32_t s_addr = ptx::shared_addr(s_storage);
  JITATTN_DEVICE_ASSERT(s_addr % 1024 == 0);
  const BwdSm90Work<Spec> work(params);
  if (work.num_keys <= 0) return;
  if (params.in_parts == kAddedParts && work.tiles.is_empty()) return;
  const int warpgroup = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    BwdBarriers<Spec>(s_addr).init();
    ptx::prefetch_tensor_map(maps.q);
    ptx::prefetch_tensor_map(maps.k);
    ptx::prefetch_tensor_map(maps.v);
    ptx::prefetch_tensor_map(maps.d_out);
  }
  RowStatistics<Spec>::init(s_addr);
  ptx::barrier_sync<Traits::kNumThreads>();  // the barriers and constants are initialised
  if (warpgroup == 0) {
    ptx::release_registers<Traits::kDqRegisters>();
    BwdDqGroup<Spec>(maps, work, s_addr).run();
  } else {
    ptx::acquire_registers<Traits::kKeyRegisters>();
    BwdKeyGroup<Spec>(params, work, s_addr, warpgroup - 1).run();
  }
}

}  // namespace jitattn

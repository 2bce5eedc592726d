// Kernel      Forward attention on wgmma and TMA: sm_90.
//
// Math        As of the mma.sync family (fwd/sm80/kernel.cuh), with the same parts: masks, scores,
//             softmax, sequences, schedule, epilogue.
//
// Paper       Shah et al., FlashAttention-3, arXiv:2407.08608: warps that load and warpgroups that
//             compute, which take turns; scores of a block beside the output of the one before. We
//             differ in: the lazy maximum (softmax.cuh), tiles drawn from a counter, the last output
//             of a tile beside the first scores of the next.
//
// Work split  Persistent CTAs, one on each multiprocessor. Warpgroup 0 copies; consumer c computes
//             rows 64 c ... of a tile of kBlockQ rows and a range of key blocks (schedule.cuh).
//
// Shared      Q [kQStages][kBlockQ, kDim], K [kStages][kBlockKv, kDim], V [kStages][kBlockKv,
// memory      kDimV], in pages of 64 columns (tile/wgmma_operand.cuh). The output is written from
//             registers.
//
// Sequences   Batched, ragged, or keys in pages. Keys in pages or named by block lists are copied in
//             pieces (gathered_blocks.cuh). The producer finds the next tile while copies fill the
//             buffers.
//
// Pipeline    producer     K_0  K_1 V_0  K_2 V_1  ...
//             consumer 0   S_0  P_0 | S_1 O_0 | P_1           | S_2 O_1 | P_2  ...
//             consumer 1   S_0  P_0           | S_1 O_0 | P_1           | S_2 O_1 | ...
//             Between bars only one consumer issues products; the others compute exponentials.
//
// fp32        As fp16 parts of scaled rows, with another loop (parts_consumer.cuh).
#pragma once

#include "jitattn/debug.cuh"
#include "jitattn/fwd/sm90/consumer.cuh"
#include "jitattn/fwd/sm90/parts_consumer.cuh"
#include "jitattn/fwd/sm90/producer.cuh"
#include "jitattn/fwd/sm90/traits.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/sm90/tma.cuh"
#include "jitattn/ptx/sm90/warpgroup.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void attn_fwd_sm90(const FwdTensorMaps& maps,
                                              const typename FwdSm90Traits<Spec>::Params& params) {
  using Traits = FwdSm90Traits<Spec>;
  extern __shared__ __align__(1024) unsigned char s_storage[];
  const uint32_t s_addr = ptx::shared_addr(s_storage);
  JITATTN_DEVICE_ASSERT(s_addr % 1024 == 0);
  // The same in all lanes, as the compiler is told so.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    FwdBarriers<Spec>(s_addr).init();
    ptx::prefetch_tensor_map(maps.q);
    ptx::prefetch_tensor_map(maps.k);
    ptx::prefetch_tensor_map(maps.v);
  }
  ptx::barrier_sync<Traits::kNumThreads>();  // the barriers are initialised
  if (warpgroup == 0) {
    ptx::release_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) FwdProducer<Spec>(params, maps, s_storage, s_addr).run();
  } else {
    ptx::acquire_registers<Traits::kConsumerRegisters>();
    using Consumer =
        typename Conditional<Traits::kIsInParts, FwdPartsConsumer<Spec>, FwdConsumer<Spec>>::type;
    Consumer(params, s_storage, s_addr, warpgroup - 1).run();
  }
}

}  // namespace jitattn

// The producer warp: draws tiles, and copies their Q, K and V with TMA.
#pragma once

#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/fwd/sm90/pipeline.cuh"
#include "jitattn/fwd/sm90/traits.cuh"
#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/ptx/sm90/tma.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct FwdProducer {
  using Traits = FwdSm90Traits<Spec>;

  const typename Traits::Params& params;
  const FwdTensorMaps& maps;
  const FwdBarriers<Spec> barriers;
  const uint32_t s_addr;
  unsigned char* const s_storage;
  Ring<Spec::kQStages> q_ring;
  Ring<Traits::kPlans> plan_ring;
  Ring<Spec::kStages> kv_ring;

  __device__ FwdProducer(const typename Traits::Params& params, const FwdTensorMaps& maps,
                         unsigned char* s_storage, uint32_t s_addr)
      : params(params),
        maps(maps),
        barriers(s_addr),
        s_addr(s_addr),
        s_storage(s_storage),
        q_ring{0, 1},
        plan_ring{0, 0},
        kv_ring{0, 1} {}

  // Runs in one warp; its first lane copies.
  __device__ __forceinline__ void run() {
    const bool is_copier = threadIdx.x == 0;
    int item = blockIdx.x;
#pragma unroll 1
    while (item < params.num_items) {
      const int next = draw(is_copier);  // early, to hide its latency
      const WorkTile tile = work_tile<Spec>(params, in_sections(item));
      if (is_copier && (kIsUniform<Spec> || tile.batch_idx >= 0)) {
        load(CtaWork<Spec>(params, tile));
      }
      item = next;
    }
    if (is_copier) publish({{0, 0, 1, 0, -1, 0}, {}}, 0);
  }

 private:
  // Returns the next item of this CTA. The counter is left at 0 by the last draw of all CTAs.
  __device__ int draw(bool is_copier) const {
    int drawn = 0;
    if (is_copier) {
      drawn = atomicAdd(params.tile_counter, 1);
      if (drawn == params.num_items - 1) atomicExch(params.tile_counter, 0);
    }
    return static_cast<int>(gridDim.x) + __shfl_sync(0xffffffffu, drawn, 0);
  }

  // Maps an item to one of the schedule's order. A section is a number of heads whose K and V fit
  // L2 together: heads are fastest within it, as the schedule has them in all.
  __device__ int in_sections(int item) const {
    if constexpr (kIsUniform<Spec> && Spec::kMask == MaskKind::kCausal) {
      const int heads = params.heads_q * params.batch;
      const int of_section = params.num_items / heads * params.section_heads;
      const int first_head = item / of_section * params.section_heads;
      const int within = item % of_section;
      const int count = min_of(params.section_heads, heads - first_head);
      return within / count * heads + first_head + within % count;
    }
    return item;
  }

  // Passes a tile to the consumers; its Q has num_bytes.
  __device__ void publish(const CtaPlan& plan, uint32_t num_bytes) {
    ptx::mbarrier_wait(barriers.q_empty(q_ring.stage), q_ring.parity);
    *reinterpret_cast<CtaPlan*>(s_storage + Traits::kOffsetPlans +
                                plan_ring.stage * Traits::kBytesPlan) = plan;
    plan_ring.advance();
    ptx::mbarrier_arrive_expect(barriers.q_full(q_ring.stage), num_bytes);
  }

  __device__ __forceinline__ void load(const CtaWork<Spec>& work) {
    load_q(work);
    int ordinal = work.range.end - 1;
    if (ordinal < work.range.begin) return;
    // K runs one block ahead of V, as the consumers do.
    load_k(work, ordinal, kv_ring);
#pragma unroll 1
    for (; ordinal > work.range.begin; --ordinal) {
      Ring<Spec::kStages> ahead = kv_ring;
      ahead.advance();
      load_k(work, ordinal - 1, ahead);
      load_v(work, ordinal, kv_ring);
      kv_ring = ahead;
    }
    load_v(work, ordinal, kv_ring);
    kv_ring.advance();
  }

  __device__ __forceinline__ void load_q(const CtaWork<Spec>& work) {
    publish({work.tile, work.sequence}, Traits::kBytesQ);
    const uint32_t s_q = s_addr + q_ring.stage * Traits::kBytesQ;
    const int row = work.sequence.q_start + work.first_row();
    const int head = index(work.tile.head_idx, params.q_stride_head);
    const int batch = index(work.tile.batch_idx, params.q_stride_batch);
#pragma unroll
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
#pragma unroll
      for (int page = 0; page < Traits::kPagesQk; ++page) {
        ptx::tma_load(s_q + consumer * Traits::kBytesConsumer + page * Traits::kBytesQPage, maps.q,
                      barriers.q_full(q_ring.stage), page * kPageColumns, row + consumer * 64, head,
                      batch);
      }
    }
    q_ring.advance();
  }

  __device__ __forceinline__ void load_k(const CtaWork<Spec>& work, int ordinal,
                                         const Ring<Spec::kStages>& ring) {
    ptx::mbarrier_wait(barriers.k_empty(ring.stage), ring.parity);
    load_block<Traits::kPagesQk>(work, ordinal, maps.k, params.k_stride_head, params.k_stride_batch,
                                 barriers.k_full(ring.stage),
                                 s_addr + Traits::kOffsetK + ring.stage * Traits::kBytesK);
  }
  __device__ __forceinline__ void load_v(const CtaWork<Spec>& work, int ordinal,
                                         const Ring<Spec::kStages>& ring) {
    ptx::mbarrier_wait(barriers.v_empty(ring.stage), ring.parity);
    load_block<Traits::kPagesV>(work, ordinal, maps.v, params.v_stride_head, params.v_stride_batch,
                                barriers.v_full(ring.stage),
                                s_addr + Traits::kOffsetV + ring.stage * Traits::kBytesV);
  }

  template <int kPages>
  __device__ __forceinline__ void load_block(const CtaWork<Spec>& work, int ordinal,
                                             const ptx::TensorMap& map, int64_t head_stride,
                                             int64_t batch_stride, uint32_t s_full,
                                             uint32_t s_block) const {
    ptx::mbarrier_arrive_expect(s_full, kPages * Traits::kBytesPage);
    const int row = work.sequence.kv_start + work.block_at(ordinal) * Spec::kBlockKv;
    const int head = index(work.kv_head_idx, head_stride);
    const int batch = index(work.kv_batch_idx, batch_stride);
#pragma unroll
    for (int page = 0; page < kPages; ++page) {
      ptx::tma_load(s_block + page * Traits::kBytesPage, map, s_full, page * kPageColumns, row,
                    head, batch);
    }
  }

  // Index in a dimension of a map, which has no extent there if the stride is 0.
  __device__ static int index(int64_t idx, int64_t stride) {
    return stride == 0 ? 0 : static_cast<int>(idx);
  }
};

}  // namespace jitattn

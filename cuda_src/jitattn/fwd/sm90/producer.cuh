// The producer warp: draws tiles, and copies their Q, K and V with TMA.
#pragma once

#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/fwd/sm90/gathered_blocks.cuh"
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
  Ring<kListedBlocks<Spec>> listed_ring;
  const bool is_copier;

  __device__ FwdProducer(const typename Traits::Params& params, const FwdTensorMaps& maps,
                         unsigned char* s_storage, uint32_t s_addr)
      : params(params),
        maps(maps),
        barriers(s_addr),
        s_addr(s_addr),
        s_storage(s_storage),
        q_ring{0, 1},
        plan_ring{0, 0},
        kv_ring{0, 1},
        listed_ring{0, 0},
        is_copier(threadIdx.x == 0) {}

  // Runs in one warp. Its first lane copies; the others copy pieces of gathered blocks.
  __device__ __forceinline__ void run() {
    int item = blockIdx.x;
    plan(item);
#pragma unroll 1
    while (item < params.num_items) {
      item = draw();  // early, to hide its latency
      CtaPlan planned = plan_in(Traits::kPlans);
      const bool exists = planned.tile.batch_idx >= 0;
      planned.tile.batch_idx = max_of(0, planned.tile.batch_idx);
      if constexpr (kIsUniform<Spec>) {
        load(CtaWork<Spec>(params, planned.tile), exists, item);
      } else {
        load(CtaWork<Spec>(params, planned.tile, planned.sequence), exists, item);
      }
    }
    if (is_copier) publish(plan_of(no_tile(), no_sequence(), {}), 0);
  }

 private:
  // Returns the next item of this CTA. The counter is left at 0 by the last draw of all CTAs.
  __device__ int draw() const {
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
    if constexpr (!kIsUniform<Spec> || Spec::kMask == MaskKind::kCausal) {
      const int heads =
          params.heads_q / params.heads_per_tile * (kIsUniform<Spec> ? params.batch : 1);
      const int of_section = params.num_items / heads * params.section_heads;
      const int first_head = item / of_section * params.section_heads;
      const int within = item % of_section;
      const int count = min_of(params.section_heads, heads - first_head);
      return within / count * heads + first_head + within % count;
    }
    return item;
  }

  // A tile of a sequence without rows.
  __device__ static WorkTile no_tile() { return {0, 0, 1, 0, -1, 0}; }
  // A sequence of one row: consumers derive positions and heads from it that exist.
  __device__ static Sequence no_sequence() { return {0, 1, 0, 0, 0, 0, 0}; }

  // Finds tile and sequence of an item, or, beyond the last one, of that. They are kept in shared
  // memory: the loop over blocks has no registers for them.
  __device__ __forceinline__ void plan(int item) const {
    item = min_of(item, params.num_items - 1);
    CtaPlan planned = {work_tile<Spec>(params, in_sections(item)), {}};
    if constexpr (!kIsUniform<Spec>) {
      if (planned.tile.batch_idx >= 0) {
        planned.sequence = Sequence::of<Spec>(params, planned.tile.batch_idx);
      } else {
        planned = {no_tile(), no_sequence()};
      }
    }
    __syncwarp();  // all lanes have read the plan before
    if (is_copier) static_cast<CtaPlan&>(plan_in(Traits::kPlans)) = planned;
    __syncwarp();
  }

  __device__ typename Traits::Plan& plan_in(int slot) const {
    return *reinterpret_cast<typename Traits::Plan*>(s_storage + Traits::kOffsetPlans +
                                                     slot * Traits::kBytesPlan);
  }

  __device__ static typename Traits::Plan plan_of(const WorkTile& tile, const Sequence& sequence,
                                                  const KvBlockRange& range) {
    if constexpr (kHasBlockLists<Spec>) {
      return {{tile, sequence}, range};
    } else {
      return {tile, sequence};
    }
  }

  // Passes a tile to the consumers; its Q has num_bytes.
  __device__ void publish(const typename Traits::Plan& plan, uint32_t num_bytes) {
    ptx::mbarrier_wait(barriers.q_empty(q_ring.stage), q_ring.parity);
    plan_in(plan_ring.stage) = plan;
    plan_ring.advance();
    ptx::mbarrier_arrive_expect(barriers.q_full(q_ring.stage), num_bytes);
  }

  // Loads a tile, and plans the next one, once copies fill the buffers: planning takes loads that
  // depend on each other. K runs one block ahead of V, as the consumers do.
  __device__ __forceinline__ void load(const CtaWork<Spec>& work, bool exists, int next_item) {
    const PieceFinder<Spec, Traits> finder = {params, static_cast<int>(threadIdx.x)};
    if (kIsUniform<Spec> || exists) load_q(work);
    const int begin = work.range.begin;
    int ordinal = work.range.end - 1;
    const bool has_blocks = ordinal >= begin;
    ListedGroup listed;
    Piece piece;
    if (has_blocks) {
      piece = finder.find(work, ordinal, listed);
      load_k(work, finder, piece, listed, kv_ring);
    }
    bool has_planned = false;
#pragma unroll 1
    do {
      Ring<Spec::kStages> ahead = kv_ring;
      ahead.advance();
      Piece next;
      if (ordinal > begin) {
        next = finder.find(work, ordinal - 1, listed);  // before the wait for the buffer
        load_k(work, finder, next, listed, ahead);
      }
      if (has_blocks) {
        load_v(work, piece, kv_ring);
        kv_ring = ahead;
      }
      piece = next;
      if (!has_planned) plan(next_item);
      has_planned = true;
    } while (--ordinal >= begin);
  }

  __device__ __forceinline__ void load_q(const CtaWork<Spec>& work) {
    if (!is_copier) return;
    publish(plan_of(work.tile, work.sequence, work.range), Traits::kBytesQ);
    const uint32_t s_q = s_addr + q_ring.stage * Traits::kBytesQ;
    const int group = params.heads_per_kv;
    const int head = index(work.tile.head_idx % group, params.q_stride_head);
    const int kv_head = index(work.kv_head_idx, params.q_stride_head);
    const int batch = index(work.tile.batch_idx, params.q_stride_batch);
#pragma unroll
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
      const int position = work.rows.position(work.first_row() + consumer * 64);
#pragma unroll
      for (int page = 0; page < Traits::kPagesQk; ++page) {
        ptx::tma_load_packed(s_q + consumer * Traits::kBytesConsumer + page * Traits::kBytesQPage,
                             maps.q, barriers.q_full(q_ring.stage),
                             first_column<Traits::kPagesOfQk, Spec::kHeadDim>(page), head,
                             work.sequence.q_start + position, kv_head, batch);
      }
    }
    q_ring.advance();
  }

  __device__ __forceinline__ void load_k(const CtaWork<Spec>& work,
                                         const PieceFinder<Spec, Traits>& finder,
                                         const Piece& piece, const ListedGroup& listed,
                                         const Ring<Spec::kStages>& ring) {
    ptx::mbarrier_wait(barriers.k_empty(ring.stage), ring.parity);
    if constexpr (kHasBlockLists<Spec>) {
      finder.store(s_addr + Traits::kOffsetListed + listed_ring.stage * Traits::kBytesListed,
                   listed);
      listed_ring.advance();
      __syncwarp();  // before the arrival of the first lane
    }
    load_block<Traits::kPagesQk, Traits::kPagesOfQk, Spec::kHeadDim>(
        work, piece, maps.k, params.k_stride_head, params.k_stride_batch,
        barriers.k_full(ring.stage), s_addr + Traits::kOffsetK + ring.stage * Traits::kBytesK);
  }
  __device__ __forceinline__ void load_v(const CtaWork<Spec>& work, const Piece& piece,
                                         const Ring<Spec::kStages>& ring) {
    ptx::mbarrier_wait(barriers.v_empty(ring.stage), ring.parity);
    load_block<Traits::kPagesV, Traits::kPagesOfV, Spec::kHeadDimV>(
        work, piece, maps.v, params.v_stride_head, params.v_stride_batch,
        barriers.v_full(ring.stage), s_addr + Traits::kOffsetV + ring.stage * Traits::kBytesV);
  }

  // Where a page begins in a row of parts of kDim columns, which have kPagesOfPart each.
  template <int kPagesOfPart, int kDim>
  __device__ static int first_column(int page) {
    return page / kPagesOfPart * kDim + page % kPagesOfPart * kPageColumns;
  }

  template <int kPages, int kPagesOfPart, int kDim>
  __device__ __forceinline__ void load_block(const CtaWork<Spec>& work, const Piece& piece,
                                             const ptx::TensorMap& map, int64_t head_stride,
                                             int64_t batch_stride, uint32_t s_full,
                                             uint32_t s_block) const {
    const int head = index(work.kv_head_idx, head_stride);
    const int own_batch = index(piece.batch, batch_stride);
    if constexpr (!kIsGathered<Spec>) {
      if (is_copier) {
        ptx::mbarrier_arrive_expect(s_full, kPages * Traits::kBytesPage);
#pragma unroll
        for (int page = 0; page < kPages; ++page) {
          ptx::tma_load(s_block + page * Traits::kBytesPage, map, s_full,
                        first_column<kPagesOfPart, kDim>(page), piece.row, head, own_batch);
        }
      }
      // All lanes wait for a free buffer: one that is two uses late would wait for ever.
      __syncwarp();
      return;
    }
    const uint32_t s_rows = params.piece_rows * kPageRowBytes;
    const uint32_t pieces = __ballot_sync(0xffffffffu, piece.exists);
    if (is_copier) ptx::mbarrier_arrive_expect(s_full, __popc(pieces) * kPages * s_rows);
    // A copy for each lane: one lane is slower with them all.
    static_assert(PieceFinder<Spec, Traits>::kGroups * kPages <= 32);
    const int idx = threadIdx.x / kPages, page = threadIdx.x % kPages;
    const int row = __shfl_sync(0xffffffffu, piece.row, idx);
    const int batch = __shfl_sync(0xffffffffu, own_batch, idx);
    if ((pieces >> idx & 1) == 0) return;
    ptx::tma_load(s_block + page * Traits::kBytesPage + idx * s_rows, map, s_full,
                  page * kPageColumns, row, head, batch);
  }

  // Index in a dimension of a map, which has no extent there if the stride is 0.
  __device__ static int index(int64_t idx, int64_t stride) {
    return stride == 0 ? 0 : static_cast<int>(idx);
  }
};

}  // namespace jitattn

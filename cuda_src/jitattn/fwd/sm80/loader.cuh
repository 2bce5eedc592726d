// Loads Q once, and key blocks from right to left into a ring of buffers. (kernel.cuh: Pipeline)
#pragma once

#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/fwd/sm80/gathered_rows.cuh"
#include "jitattn/fwd/sm80/matrix_loader.cuh"
#include "jitattn/fwd/sm80/traits.cuh"
#include "jitattn/ptx/cp_async.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Offsets of the Q, K and V of this (batch, head), in elements.
struct OperandOffsets {
  int64_t q;
  int64_t k;
  int64_t v;

  template <class Spec>
  __device__ __forceinline__ static OperandOffsets of(const CtaWork<Spec>& work) {
    const FwdParamsOf<Spec>& params = work.params;
    const int64_t kv_start = kIsPaged<Spec> ? 0 : work.sequence.kv_start;
    return {work.tile.batch_idx * params.q_stride_batch +
                work.sequence.q_start * params.q_stride_row +
                work.tile.head_idx * params.q_stride_head,
            work.k_batch_idx() * params.k_stride_batch + kv_start * params.k_stride_row +
                work.kv_head_idx * params.k_stride_head,
            work.kv_batch_idx * params.v_stride_batch + kv_start * params.v_stride_row +
                work.kv_head_idx * params.v_stride_head};
  }
};

// Tile copies of Q, K and V by all threads (tile/copy.cuh).
template <class Spec>
struct OperandCopies {
  using Traits = FwdTraits<Spec>;

  const typename Traits::CopyQ q;
  const typename Traits::CopyK k;
  const typename Traits::CopyV v;

  __device__ __forceinline__ explicit OperandCopies(const FwdParamsOf<Spec>& params)
      : q(Traits::Threads::idx(), 0),
        k(Traits::Threads::idx(), params.k_stride_row),
        v(Traits::Threads::idx(), params.v_stride_row) {}
};

template <class Spec>
struct TileLoader {
  using Traits = FwdTraits<Spec>;
  using Threads = typename Traits::Threads;
  static constexpr int kStages = Spec::kStages;
  // Number of blocks in flight ahead of a step.
  static constexpr int kPrefetch = kStages == 1 ? 1 : kStages - 1;
  static constexpr int64_t kElementBytes = sizeof(typename Traits::Element);
  static constexpr int64_t kBytesOfQk = sizeof(typename Traits::ElementQk);

  const CtaWork<Spec>& work;
  const OperandOffsets& offsets;
  const OperandCopies<Spec>& copies;
  const GatheredRows<Spec>& gathered;
  const MatrixLoader<Spec> matrices;
  const uint32_t s_addr;  // of the CTA's storage, which begins with Q
  // This thread's share of the next block to copy; advanced after each copy. Gathered: row 0 of
  // all.
  const char* g_k;
  const char* g_v;
  const int64_t k_block_bytes, v_block_bytes;

  __device__ __forceinline__ TileLoader(const CtaWork<Spec>& work, const OperandOffsets& offsets,
                                        const OperandCopies<Spec>& copies,
                                        const GatheredRows<Spec>& gathered, uint32_t s_addr)
      : work(work),
        offsets(offsets),
        copies(copies),
        gathered(gathered),
        matrices{work, gathered, s_addr},
        s_addr(s_addr),
        k_block_bytes(work.params.k_stride_row * (Spec::kBlockKv * kBytesOfQk)),
        v_block_bytes(work.params.v_stride_row * (Spec::kBlockKv * kElementBytes)) {
    const char* g_first_k = reinterpret_cast<const char*>(
        static_cast<const typename Traits::ElementQk*>(work.params.k) + offsets.k);
    const char* g_first_v = reinterpret_cast<const char*>(
        static_cast<const typename Traits::Element*>(work.params.v) + offsets.v);
    const int last_block = work.block_at(work.range.end - 1);
    if constexpr (Traits::kGathersK) {
      g_k = gathered.lane_k(copies.k.lane(g_first_k), copies.k.row);
    } else {
      g_k = copies.k.share(g_first_k + last_block * k_block_bytes);
    }
    if constexpr (Traits::kIsGathered) {
      g_v = gathered.lane_v(copies.v.lane(g_first_v), copies.v.row);
    } else {
      g_v = copies.v.share(g_first_v + last_block * v_block_bytes);
    }
  }

  // Starts copying Q and the first kPrefetch blocks. Only the first, right-most one has a tail.
  __device__ __forceinline__ void start(int ordinal) {
    load_q();
    copies.q.zero_padding(s_addr);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      copies.k.zero_padding(s_addr + (Traits::kOffsetK + stage * Traits::kBytesK));
      copies.v.zero_padding(s_addr + (Traits::kOffsetV + stage * Traits::kBytesV));
    }
    if constexpr (Traits::kIsGathered) {
      gathered.begin(ordinal, work.range);
      Threads::sync();  // the rows of the first blocks are published
    }
    load_k<true>(ordinal, 0, 0);
    if constexpr (kStages > 1) load_v<true>(ordinal, 0, 0);
    ptx::cp_async_commit();
#pragma unroll
    for (int ahead = 1; ahead < kPrefetch; ++ahead) {
      if (ordinal - ahead >= work.range.begin) {
        load_k<false>(ordinal, ahead, ahead);
        load_v<false>(ordinal, ahead, ahead);
      }
      ptx::cp_async_commit();
    }
  }

  // Waits until Q is in shared memory: it was copied with the first block.
  __device__ void wait_for_q() const {
    ptx::cp_async_wait<kPrefetch - 1>();
    Threads::sync();
  }

  // Negates Q, each thread its own chunks; the loop's first barrier publishes them.
  __device__ void negate_q() const {
    ptx::cp_async_wait<0>();
    copies.q.negate(s_addr);
  }

  // Begins a step: waits for its K, with more than one stage for its V too, and starts the next
  // copies. kMayBeFirst: the step may be that of the right-most block.
  template <bool kMayBeFirst>
  __device__ __forceinline__ void begin_step(int ordinal, int stage) {
    // Protects: this step's tiles, written by all threads' copies, before anyone reads them; and
    // the buffer that the previous step read, before the next copy overwrites it.
    ptx::cp_async_wait<kStages == 1 ? 0 : kPrefetch - 1>();
    Threads::sync();
    if constexpr (kStages > 1) {
      const int next_stage = stage == 0 ? kStages - 1 : stage - 1;  // kPrefetch ahead in the ring
      if (ordinal - kPrefetch >= work.range.begin) {
        load_k<false>(ordinal, kPrefetch, next_stage);
        load_v<false>(ordinal, kPrefetch, next_stage);
      }
    } else {
      load_v<kMayBeFirst>(ordinal, 0, 0);
    }
    ptx::cp_async_commit();
  }

  // Ends the scores of a step. With one stage: waits for V, and starts copying the next K.
  __device__ __forceinline__ void end_scores(int ordinal) {
    if constexpr (kStages == 1) {
      // Protects: V of this step before anyone reads it; K of this step from the next copy.
      ptx::cp_async_wait<0>();
      Threads::sync();
      if (ordinal > work.range.begin) load_k<false>(ordinal, 1, 0);
      ptx::cp_async_commit();
    }
  }

 private:
  __device__ __forceinline__ void load_q() const {
    const FwdParamsOf<Spec>& params = work.params;
    const char* g_q = reinterpret_cast<const char*>(
        static_cast<const typename Traits::ElementQk*>(params.q) + offsets.q);
    copies.q.template load_rows<true, false>(
        s_addr, copies.q.lane(g_q), work.rows.num_rows - work.first_row(), [&](int skip) {
          const int row = work.first_row() + copies.q.row + skip;
          const int position = work.rows.position(row);
          const int own =
              kHasBlockLists<Spec> ? max_of(position, work.sequence.first_position) : position;
          return (own * params.q_stride_row +
                  work.rows.head(row, position) * params.q_stride_head) *
                 kBytesOfQk;
        });
  }

  // Copies the block that comes `ahead` steps after `ordinal`.
  template <bool kMayBeFirst>
  __device__ __forceinline__ void load_k(int ordinal, int ahead, int stage) {
    matrices.load(stage, work.block_at(ordinal - ahead));
    load<kMayBeFirst, Traits::kGathersK>(
        copies.k, s_addr + (Traits::kOffsetK + stage * Traits::kBytesK), g_k, k_block_bytes,
        ordinal, ahead,
        [&](int skip) { return gathered.offset_k(ordinal - ahead, copies.k.row, skip); });
  }
  template <bool kMayBeFirst>
  __device__ __forceinline__ void load_v(int ordinal, int ahead, int stage) {
    load<kMayBeFirst, Traits::kIsGathered>(
        copies.v, s_addr + (Traits::kOffsetV + stage * Traits::kBytesV), g_v, v_block_bytes,
        ordinal, ahead,
        [&](int skip) { return gathered.offset_v(ordinal - ahead, copies.v.row, skip); });
  }

  template <bool kMayBeFirst, bool kGathers, class Copy, class RowOffset>
  __device__ __forceinline__ void load(const Copy& copy, uint32_t s_tile_addr, const char*& g_share,
                                       int64_t block_bytes, int ordinal, int ahead,
                                       RowOffset row_offset) {
    if constexpr (kGathers) {
      copy.template load_rows<kMayBeFirst, true>(s_tile_addr, g_share, work.keys_left(ordinal),
                                                 row_offset);
    } else {
      if constexpr (kMayBeFirst) {
        copy.load_tail(s_tile_addr, g_share, work.keys_left(ordinal));
      } else {
        copy.load_full(s_tile_addr, g_share);
      }
      const int next = ordinal - ahead - 1;
      g_share -= (kHasGap<Spec> ? work.block_at(next + 1) - work.block_at(next) : 1) * block_bytes;
    }
  }
};

}  // namespace jitattn

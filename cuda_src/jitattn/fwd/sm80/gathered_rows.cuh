// Gathered K and V rows (paged KV, or groups of a block list): byte offsets, resolved well ahead of
// the copies. INT8 K is never paged; then only V is gathered.
//
// Keys are looked up in contiguous groups: groups of 16 for lists, and for pages that hold a
// multiple of 16 keys; otherwise one by one. Blocks form batches of kBatch. In the first step of a
// batch, all threads look up the next batch; at the end of the step they store the offsets of each
// group's first K row and V row in shared memory, from which all copies read them, and the list
// entry of the group. There is room for two batches.
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/fwd/sm80/traits.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct GatheredRows {
  using Traits = FwdTraits<Spec>;
  static constexpr int kGroup = Traits::kGroup;
  static constexpr int kGroups = Spec::kBlockKv / kGroup;  // per block
  static constexpr int kBatch = Traits::kGatherBatch;
  static constexpr int kBatchGroups = kBatch * kGroups;
  static constexpr int kGroupsPerThread = ceil_div(kBatchGroups, Traits::kNumThreads);
  static_assert(kBatch > Spec::kStages, "a batch is looked up before its first copy");
  static constexpr int64_t kElementBytes = sizeof(typename Traits::Element);
  // A thread's rows lie whole groups apart, so that its offset within a group never changes.
  static_assert(!Traits::kIsGathered || (Traits::CopyK::kRowsPerPass % kGroup == 0 &&
                                         Traits::CopyV::kRowsPerPass % kGroup == 0));

  // Page, row within the page, and list entry of the first key of this thread's groups of a batch.
  struct Lookup {
    int page[kGroupsPerThread];
    int row[kGroupsPerThread];
    ListedGroup listed[kHasBlockLists<Spec> ? kGroupsPerThread : 1];
  };

  const FwdParamsOf<Spec>& params;
  const int32_t* g_table;  // of this sequence
  const uint32_t s_addr;   // [2 * kBatch, kGroups] pairs of int64
  const int kv_start, len_kv;

  __device__ GatheredRows(const FwdParamsOf<Spec>& params, const Sequence& sequence, int batch_idx,
                          uint32_t s_storage_addr)
      : params(params),
        g_table(table_of(params, batch_idx)),
        s_addr(s_storage_addr + Traits::kOffsetRows),
        kv_start(sequence.kv_start),
        len_kv(sequence.len_kv) {}

  // Looks up the batch of block `ordinal` and the next one. Called by all threads before the first
  // copies.
  __device__ __forceinline__ void begin(int ordinal, const KvBlockRange& range) const {
    const int batch = batch_of(ordinal);
    const Lookup found = look_up(batch, range), next = look_up(batch - 1, range);
    store(found, batch);
    store(next, batch - 1);
  }

  // Looks up the next batch, in the first step of a batch; store_next stores it at the end of the
  // step.
  __device__ __forceinline__ void look_up_next(Lookup& found, int ordinal,
                                               const KvBlockRange& range) const {
    if constexpr (Traits::kIsGathered) {
      if (is_first_of_batch(ordinal)) found = look_up(batch_of(ordinal) - 1, range);
    }
  }
  __device__ __forceinline__ void store_next(const Lookup& found, int ordinal) const {
    if constexpr (Traits::kIsGathered) {
      if (is_first_of_batch(ordinal)) store(found, batch_of(ordinal) - 1);
    }
  }

  // Address of the list entries of a block's groups.
  __device__ uint32_t listed_addr(uint32_t ordinal) const {
    return s_addr + (Traits::kOffsetListed - Traits::kOffsetRows) +
           ordinal % (2 * kBatch) * (Spec::kBlockKv / 16 * 8);
  }

  // For copies of K, where `first_row` is a thread's first row: lane_k returns the thread's pointer
  // into the first page, offset_k the bytes from there to its row `skip` rows on, in block
  // `ordinal`.
  __device__ const char* lane_k(const char* g_lane, int first_row) const {
    return g_lane + first_row % kGroup * params.k_stride_row * kElementBytes;
  }
  __device__ int64_t offset_k(int ordinal, int first_row, int skip) const {
    return ptx::ld_shared_b64(row_addr(ordinal, first_row, skip));
  }
  // lane_k and offset_k for V.
  __device__ const char* lane_v(const char* g_lane, int first_row) const {
    return g_lane + first_row % kGroup * params.v_stride_row * kElementBytes;
  }
  __device__ int64_t offset_v(int ordinal, int first_row, int skip) const {
    return ptx::ld_shared_b64(row_addr(ordinal, first_row, skip) + 8);
  }

 private:
  __device__ static int batch_of(uint32_t ordinal) { return ordinal / kBatch; }

  // Whether the next batch is looked up in the step of this block.
  __device__ static bool is_first_of_batch(uint32_t ordinal) {
    return ordinal % kBatch == kBatch - 1;
  }

  // Looks up a batch of ordinals; batches are visited from right to left.
  __device__ Lookup look_up(int batch, const KvBlockRange& range) const {
    Lookup found;
#pragma unroll
    for (int i = 0; i < kGroupsPerThread; ++i) {
      int key = batch * (kBatch * Spec::kBlockKv) + group_of(i) * kGroup;
      if constexpr (kHasGap<Spec>) {
        const int ordinal = batch * kBatch + group_of(i) / kGroups;
        key = range.template block_at<Spec>(ordinal) * Spec::kBlockKv +
              group_of(i) % kGroups * kGroup;
      }
      if constexpr (kHasBlockLists<Spec>) {
        const int slot = batch * kBatchGroups + group_of(i);
        found.listed[i] = range.listed_group(slot * kGroup / 16, is_mine(i) && batch >= 0);
        key = found.listed[i].first_key + slot * kGroup % 16;
      }
      found.page[i] = 0;
      found.row[i] = 0;
      if (!is_mine(i) || batch < 0 || key >= len_kv) continue;
      if constexpr (!Traits::kIsPaged) {
        found.row[i] = key;
      } else {
        const int idx = divide(kv_start + key, params.page_div_mul, params.page_div_shift);
        found.row[i] = kv_start + key - idx * params.page_size;
        found.page[i] = load_index(g_table, idx, params.table_word);
      }
    }
    return found;
  }

  __device__ void store(const Lookup& found, int batch) const {
#pragma unroll
    for (int i = 0; i < kGroupsPerThread; ++i) {
      if (!is_mine(i)) continue;
      // A page index beyond the pages is replaced by 0: no other memory is read.
      const bool exists =
          Traits::kIsPaged && static_cast<uint32_t>(found.page[i]) < params.num_pages;
      const int64_t page = exists ? found.page[i] : 0, row = found.row[i];
      const uint32_t slot = slot_addr((batch & 1) * kBatch, group_of(i));
      const int64_t offset_v =
          (page * params.v_stride_batch + row * params.v_stride_row) * kElementBytes;
      if constexpr (Traits::kGathersK) {
        ptx::st_shared_v2_b64(
            slot, (page * params.k_stride_batch + row * params.k_stride_row) * kElementBytes,
            offset_v);
      } else {
        ptx::st_shared_b64(slot + 8, offset_v);
      }
      if constexpr (kHasBlockLists<Spec>) {
        const uint32_t key = group_of(i) * kGroup;
        if (key % 16 != 0) continue;
        ptx::st_shared_b64(listed_addr((batch & 1) * kBatch) + key / 16 * 8,
                           packed<Spec>(found.listed[i]));
      }
    }
  }

  __device__ static const int32_t* table_of(const FwdParamsOf<Spec>& params, int batch_idx) {
    if constexpr (Traits::kIsPaged) return params.block_table + batch_idx * params.table_stride;
    return nullptr;
  }

  __device__ static int group_of(int i) { return threadIdx.x + i * Traits::kNumThreads; }
  __device__ static bool is_mine(int i) {
    return kBatchGroups % Traits::kNumThreads == 0 || group_of(i) < kBatchGroups;
  }

  __device__ uint32_t slot_addr(uint32_t slot, uint32_t group) const {
    return s_addr + (slot * kGroups + group) * 16;
  }
  __device__ uint32_t row_addr(uint32_t ordinal, uint32_t first_row, int skip) const {
    return slot_addr(ordinal % (2 * kBatch), first_row / kGroup) + skip / kGroup * 16;
  }
};

}  // namespace jitattn

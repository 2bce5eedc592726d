// Where the rows of paged keys and values lie: byte offsets, resolved a few steps ahead.
//
// A thread looks up the page of its own key, one block at a time, and leaves the offsets of that K
// row and V row in shared memory, where all copies of the block find them. A lookup is started at
// the beginning of a step and stored at its end, so that its latency is hidden.
#pragma once

#include "jitattn/params.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/rows.cuh"
#include "jitattn/sequence.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <class Traits, int kBlockKv>
struct PagedRows {
  static constexpr int kSlots = Traits::kPageSlots;
  static constexpr int kKeysPerThread = ceil_div(kBlockKv, Traits::kNumThreads);
  static constexpr int64_t kElementBytes = sizeof(typename Traits::Element);

  // Page and row within it of this thread's keys of one block; page -1 for a key beyond the end.
  struct Lookup {
    int page[kKeysPerThread];
    int row[kKeysPerThread];
  };

  const FwdParams& params;
  const int32_t* g_table;  // of this sequence
  const uint32_t s_addr;   // [kSlots, kBlockKv] pairs of int64
  const int kv_start, len_kv;

  __device__ PagedRows(const FwdParams& params, const Sequence& sequence, int batch_idx,
                       uint32_t s_addr)
      : params(params),
        g_table(params.block_table + batch_idx * params.table_stride),
        s_addr(s_addr),
        kv_start(sequence.kv_start),
        len_kv(sequence.len_kv) {}

  __device__ Lookup look_up(int block) const {
    Lookup found;
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      const int key = block * kBlockKv + threadIdx.x + i * Traits::kNumThreads;
      found.page[i] = -1;
      found.row[i] = 0;
      if (block >= 0 && key < len_kv) {
        const int idx = divide(kv_start + key, params.page_div_mul, params.page_div_shift);
        found.row[i] = kv_start + key - idx * params.page_size;
        found.page[i] = load_index(g_table, idx, params.table_word);
      }
    }
    return found;
  }

  __device__ void store(const Lookup& found, int slot) const {
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      const int key = threadIdx.x + i * Traits::kNumThreads;
      if (kBlockKv % Traits::kNumThreads != 0 && key >= kBlockKv) continue;
      const int64_t page = found.page[i], row = found.row[i];
      // A page that does not exist is never read, whatever the table says.
      const bool exists = static_cast<uint32_t>(found.page[i]) < params.num_pages;
      const int64_t offset_k =
          (page * params.k_stride_batch + row * params.k_stride_row) * kElementBytes;
      const int64_t offset_v =
          (page * params.v_stride_batch + row * params.v_stride_row) * kElementBytes;
      ptx::st_shared_v2_b64(slot_addr(slot, key), exists ? offset_k : -1, exists ? offset_v : -1);
    }
  }

  // Bytes from the first page to a row of K or V of the block in `slot`; negative: no such key.
  __device__ int64_t offset_k(int slot, int row) const {
    return ptx::ld_shared_b64(slot_addr(slot, row));
  }
  __device__ int64_t offset_v(int slot, int row) const {
    return ptx::ld_shared_b64(slot_addr(slot, row) + 8);
  }

 private:
  __device__ uint32_t slot_addr(int slot, int key) const {
    return s_addr + (slot * kBlockKv + key) * 16;
  }
};

}  // namespace jitattn

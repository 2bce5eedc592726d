// Query tiles that a key block visits, in order: all tiles of a range, or those whose lists contain
// keys of the block.
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm80/storage.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Visits all tiles of a range.
template <class Spec, class Traits, class Keys>
struct AllTiles {
  static constexpr int kChunk = 0x40000000;  // tiles examined together

  const Keys& keys;

  __device__ __forceinline__ AllTiles(const BwdParamsOf<Spec>&, const Sequence&,
                                      const BwdStorage<Traits>&, const Keys& keys, int, int)
      : keys(keys) {}

  __device__ __forceinline__ void examine(int, int) {}
  __device__ int next(int tile) const { return tile; }
  __device__ bool is_free(int tile) const { return keys.is_free(tile); }
  __device__ __forceinline__ BlockListHead window() const { return {}; }
  __device__ void store_entries(int, int) const {}
};

// Visits the tiles whose lists contain keys of the block. Each thread examines the list of one tile
// of a chunk and stores the result in shared memory: bit idx % 32 of word idx / 32 says whether the
// list of tile `chunk + idx` contains any key of the block; the words at s_free_addr, in the same
// order, whether all rows see all keys; those at s_whole_addr, whether a mask function hides nothing;
// the cell bits of the lists follow.
template <class Spec, class Traits, class Keys>
struct ListedTiles {
  static constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;
  static constexpr int kGroups = kBlockKv / 16;
  static constexpr int kChunk = Traits::kNumThreads;

  const BwdParamsOf<Spec>& params;
  const Sequence& sequence;
  const BwdStorage<Traits>& storage;
  const int first_key;
  const int num_keys;
  const int4 head;
  int chunk = 0;
  int chunk_end = 0;

  __device__ __forceinline__ ListedTiles(const BwdParamsOf<Spec>& params, const Sequence& sequence,
                                         const BwdStorage<Traits>& storage, const Keys& keys,
                                         int num_keys, int head_idx)
      : params(params),
        sequence(sequence),
        storage(storage),
        first_key(keys.first_key),
        num_keys(num_keys),
        head(load_block_list_head<Spec>(params, sequence, head_idx)) {}

  // Examines a chunk of the range. Called by all threads.
  __device__ __forceinline__ void examine(int first_tile, int end_tile) {
    chunk = first_tile;
    chunk_end = end_tile;
    uint32_t bits[kGroups] = {};
    bool is_listed = false, sees_all = false, is_whole = false;
    const int tile = chunk + threadIdx.x;
    if (tile < chunk_end) examine_list(tile, bits, is_listed, sees_all, is_whole);
    const uint32_t any = __ballot_sync(0xffffffffu, is_listed);
    const uint32_t all = __ballot_sync(0xffffffffu, sees_all);
    const uint32_t whole = __ballot_sync(0xffffffffu, is_whole);
    ptx::barrier_sync<Traits::kNumThreads>();  // the last chunk's results have been read
    if (threadIdx.x % 32 == 0) {
      const int warp_idx = threadIdx.x / 32;
      ptx::st_shared_b32(storage.found + warp_idx * 4, any);
      ptx::st_shared_b32(s_free_addr() + warp_idx * 4, all);
      if constexpr (Traits::kKnowsWhole) {
        ptx::st_shared_b32(s_whole_addr() + warp_idx * 4, whole);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) ptx::st_shared_b32(s_bits_addr(threadIdx.x) + i * 4, bits[i]);
    ptx::barrier_sync<Traits::kNumThreads>();
  }

  // Returns the first tile from `tile` on to visit in the chunk; the chunk's end if there is none.
  __device__ int next(int tile) const {
    for (int idx = tile - chunk; idx < chunk_end - chunk; idx = (idx / 32 + 1) * 32) {
      const uint32_t any = ptx::ld_shared_b32(storage.found + idx / 32 * 4) >> idx % 32;
      if (any != 0) return chunk + idx + __ffs(any) - 1;
    }
    return max_of(tile, chunk_end);
  }

  // Whether every row of a tile sees every key.
  __device__ bool is_free(int tile) const { return has_bit(s_free_addr(), tile); }

  __device__ __forceinline__ BlockListHead window() const { return {head.y, head.z, head.w}; }

  // Stores the list entries of a tile for the block, in the format of block_lists.cuh.
  __device__ void store_entries(int stage, int tile) const {
    const int group = threadIdx.x;
    if (group >= kGroups) return;
    ListedGroup listed = {first_key + group * 16, 0, 0};
    listed.bits = ptx::ld_shared_b32(s_bits_addr(tile - chunk) + group * 4);
    if constexpr (Traits::kKnowsWhole) listed.whole = has_bit(s_whole_addr(), tile) ? ~0u : 0u;
    ptx::st_shared_b64(storage.listed(stage) + group * 8, packed<Spec>(listed));
  }

 private:
  __device__ uint32_t s_free_addr() const { return storage.found + Traits::kBytesAny; }
  __device__ uint32_t s_whole_addr() const { return storage.found + 2 * Traits::kBytesAny; }
  __device__ uint32_t s_bits_addr(int idx) const {
    return storage.found + Traits::kTileBits * Traits::kBytesAny + idx * kGroups * 4;
  }
  __device__ bool has_bit(uint32_t s_addr, int tile) const {
    const int idx = tile - chunk;
    return (ptx::ld_shared_b32(s_addr + idx / 32 * 4) >> idx % 32 & 1) != 0;
  }

  __device__ __forceinline__ void examine_list(int tile, uint32_t (&bits)[kGroups], bool& is_listed,
                                               bool& sees_all, bool& is_whole) const {
    const BlockListSpan span = listed_span(params, sequence, head, tile * kBlockQ);
    const int last = min_of((tile + 1) * kBlockQ, sequence.len_q) - 1 + sequence.diagonal;
    const int first = max_of(tile * kBlockQ, sequence.first_position) + sequence.diagonal;
    const bool is_near =
        first_key <= last + head.y && (first_key + num_keys > first + head.z || first_key < head.w);
    uint32_t whole = 0;
    if (is_near) is_listed = load_listed_bits(bits, whole, span, first_key, num_keys);
    // All rows of the list's tile, which may be more than these.
    const uint32_t parts = (1u << ceil_div(1 << params.list_log2, kWholeRows)) - 1;
    is_whole = (whole & parts) == parts;
    sees_all = is_listed && num_keys == kBlockKv && first_key + kBlockKv - 1 <= first + head.y &&
               (first_key >= last + head.z || first_key + kBlockKv <= head.w) &&
               has_all_cells(bits, params.list_log2);
  }
};

template <class Spec, class Traits, class Keys>
using QueryQueue = typename Conditional<kHasBlockLists<Spec>, ListedTiles<Spec, Traits, Keys>,
                                        AllTiles<Spec, Traits, Keys>>::type;

}  // namespace jitattn

// Block lists: the gathered groups of 16 keys of a block, and the mask of the keys in each group.
//
// A list names groups of 16 keys in ascending order, each with one bit per cell of 8 queries x 8
// keys. Each head also has a window (schedule.cuh: BlockListHead), whose bounds need not be block
// bounds.
#pragma once

#include "jitattn/attention/list_entry.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// An entry in shared memory: the first key, whose low bits are free for those of whole_of; the cells.
template <class Spec>
__device__ __forceinline__ int64_t packed(const ListedGroup& listed) {
  uint32_t low = listed.first_key;
  if constexpr (knows_whole_blocks<Spec>()) low |= listed.whole & 15;
  return static_cast<int64_t>(static_cast<uint64_t>(listed.bits) << 32 | low);
}
template <class Spec>
__device__ __forceinline__ ListedGroup load_listed(uint32_t s_listed, int group) {
  const int64_t entry = ptx::ld_shared_b64(s_listed + group * 8);
  const int low = static_cast<int>(entry);
  const uint32_t bits = static_cast<uint32_t>(entry >> 32);
  if constexpr (knows_whole_blocks<Spec>()) return {low & ~15, bits, static_cast<uint32_t>(low)};
  return {low, bits, 0};
}

// Stores the list entry of key group t in thread t < kKeys / 16. The groups begin at first_key;
// `idx` is the first list entry that can name one of them.
template <class Spec>
__device__ __forceinline__ void store_listed(uint32_t s_listed, const BlockListSpan& span, int idx,
                                             int first_key) {
  const int wanted = first_key / 16 + threadIdx.x;
  ListedGroup listed = {wanted * 16, 0, 0};
#pragma unroll 1
  for (int i = idx; i < min_of(idx + Spec::kBlockKv / 16, span.count); ++i) {
    const int2 entry = __ldg(span.g_groups + i);
    if (group_of(entry) != wanted) continue;
    listed.bits = entry.y;
    listed.whole = whole_of(entry);
  }
  ptx::st_shared_b64(s_listed + threadIdx.x * 8, packed<Spec>(listed));
}

// Loads the cell bits of the groups of num_keys keys from first_key on; returns whether any is
// listed. whole: those bits that all have which are listed.
template <int kGroups>
__device__ __forceinline__ bool load_listed_bits(uint32_t (&bits)[kGroups], uint32_t& whole,
                                                 const BlockListSpan& span, int first_key,
                                                 int num_keys) {
  const int begin = span.before(first_key);
  bool is_listed = false;
  whole = ~0u;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (begin + i >= span.count) continue;
    const int2 entry = __ldg(span.g_groups + begin + i);
    const int idx = group_of(entry) - first_key / 16;
    is_listed |= idx * 16 < num_keys;
    if (idx < kGroups) whole &= whole_of(entry);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) bits[j] |= idx == j ? entry.y : 0;
  }
  return is_listed;
}

// Whether every query of a list sees every key of these groups, apart from its window.
template <int kGroups>
__device__ __forceinline__ bool has_all_cells(const uint32_t (&bits)[kGroups], int list_log2) {
  const uint32_t low = (1u << (1 << (list_log2 - 3))) - 1, all = low | low << 16;
  bool has_all = true;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) has_all &= bits[i] == all;
  return has_all;
}

// Whether the keys of a block are groups of 16 that need not be adjacent.
template <class Spec>
constexpr bool kHasGroups = kHasBlockLists<Spec> || kGathersKeys<Spec>;

// Maps n8 tile n of a warp's keys to the key of this lane's first column in it.
template <class Spec>
struct KeyColumns {
  int first;               // in tile 0; groups: within an n8 tile
  uint32_t s_listed = 0;   // lists: entries of the warp's groups
  int first_keys[4] = {};  // gathered keys: first keys of the warp's groups

  __device__ int operator()(int n) const {
    if constexpr (kGathersKeys<Spec>) return first_keys[n / 2] + n % 2 * 8 + first;
    if constexpr (kHasBlockLists<Spec>) {
      return load_listed<Spec>(s_listed, n / 2).first_key + n % 2 * 8 + first;
    }
    return first + n * 8;
  }
};

// Returns the matrix row of the query at `position`; positions before the first query map to row 0.
template <class Spec>
__device__ __forceinline__ int64_t matrix_row(const Sequence& sequence, int position) {
  if constexpr (kHasBlockLists<Spec>) return max_of(0, position - sequence.first_position);
  return position;
}

// Whether every row of a warp sees every key of its groups.
template <class Spec, int kKeyTiles>
__device__ __forceinline__ bool sees_all_listed(const FwdBlockListParams& params,
                                                const Sequence& sequence, const BlockListHead& head,
                                                uint32_t s_listed, int first_position,
                                                int last_position) {
  const int cells = 1 << (params.list_log2 - 3);
  const uint32_t low = (1u << cells) - 1, all = low | low << 16;
  const int limit = min_of(sequence.len_kv, first_position + sequence.diagonal + head.right + 1);
  const int first = last_position + sequence.diagonal + head.left;
  bool sees_all = true;
#pragma unroll
  for (int group = 0; group < kKeyTiles / 2; ++group) {
    const ListedGroup listed = load_listed<Spec>(s_listed, group);
    sees_all &= listed.bits == all && listed.first_key + 16 <= limit &&
                (listed.first_key >= first || listed.first_key + 16 <= head.keep_first);
  }
  return sees_all;
}

// Whether a mask function hides no key of these groups from any row of a warp, as far as the list
// tells. Called by all lanes.
template <class Spec, int kRowTiles, int kKeyTiles, class WarpRows>
__device__ __forceinline__ bool is_whole(const FwdBlockListParams& params, const Sequence& sequence,
                                         const RowMap& rows, uint32_t s_listed,
                                         const WarpRows& warp_rows) {
  uint32_t whole = ~0u;
#pragma unroll
  for (int group = 0; group < kKeyTiles / 2; ++group) {
    whole &= load_listed<Spec>(s_listed, group).whole;
  }
  bool is_so = true;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = rows.position(warp_rows(m, half)) + sequence.diagonal;
      const int part = (position & ((1 << params.list_log2) - 1)) / kWholeRows;
      is_so &= (whole >> part & 1) != 0;
    }
  }
  return __all_sync(0xffffffffu, is_so);
}

// Sets hidden scores to -inf. r_s: scores of a warp's rows (tile/warp_rows.cuh).
template <class Spec, class WarpRows, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void mask_listed(float (&r_s)[kRowTiles][kKeyTiles][4],
                                            const FwdBlockListParams& params,
                                            const Sequence& sequence, const RowMap& rows,
                                            const BlockListHead& head, uint32_t s_listed,
                                            const WarpRows& warp_rows) {
  const int column = accumulator_column(warp_rows.lane_idx);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = rows.position(warp_rows(m, half)) + sequence.diagonal;
      const int cell = (position & ((1 << params.list_log2) - 1)) >> 3;
      const int limit = min_of(sequence.len_kv, position + head.right + 1) - column;
      const int first = position + head.left - column;
      const int kept = head.keep_first - column;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const ListedGroup listed = load_listed<Spec>(s_listed, n / 2);
        const bool is_listed = (listed.bits >> (cell + n % 2 * 16) & 1) != 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = listed.first_key + n % 2 * 8 + i;
          const bool sees = is_listed && key < limit && (key >= first || key < kept);
          float& score = r_s[m][n][2 * half + i];
          score = sees ? score : -infinity();
        }
      }
    }
  }
}

}  // namespace jitattn

// Key blocks that are gathered: a block is made of pieces, which lie in pages or are named by a list.
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Whether K and V are copied piece by piece. A lane looks up a piece, and copies it.
template <class Spec>
constexpr bool kIsGathered = kIsPaged<Spec> || kHasBlockLists<Spec>;

// A piece of a key block, or all of it: rows that are next to each other in memory.
struct Piece {
  int row;      // of the page or the batch row
  int batch;    // page, or batch row
  bool exists;  // else its keys are hidden, and nothing is copied
};

// Number of blocks whose list entries are kept: those of all stages of K, and the one whose scores
// are weighed when its K may be overwritten.
template <class Spec>
constexpr int kListedBlocks = Spec::kStages + 1;

// Looks up key blocks, or their pieces. Called by all lanes of a warp.
template <class Spec, class Traits>
struct PieceFinder {
  static constexpr int kGroups = Spec::kBlockKv / 16;  // the most pieces
  const typename Traits::Params& params;
  const int lane_idx;

  // Returns this lane's piece of a block, or the block. listed: the lane's list entry, where there
  // are block lists.
  __device__ Piece find(const CtaWork<Spec>& work, int ordinal, ListedGroup& listed) const {
    if constexpr (kIsGathered<Spec>) {
      return find_piece(work, ordinal, listed);
    } else {
      return {work.sequence.kv_start + work.block_at(ordinal) * Spec::kBlockKv,
              static_cast<int>(work.kv_batch_idx), true};
    }
  }

  // Leaves the list entries of a block in shared memory.
  __device__ void store(uint32_t s_listed, const ListedGroup& listed) const {
    if (lane_idx >= kGroups) return;
    ptx::st_shared_b64(s_listed + lane_idx * 8, packed<Spec>(listed));
  }

 private:
  __device__ Piece find_piece(const CtaWork<Spec>& work, int ordinal, ListedGroup& listed) const {
    int key = work.block_at(ordinal) * Spec::kBlockKv + lane_idx * params.piece_rows;
    bool is_mine = lane_idx * params.piece_rows < Spec::kBlockKv;
    if constexpr (kHasBlockLists<Spec>) {
      is_mine = lane_idx < kGroups;
      listed = work.range.listed_group(ordinal * kGroups + lane_idx, is_mine);
      key = listed.first_key;
    }
    const bool exists = is_mine && key < work.len_kv();
    if constexpr (!kIsPaged<Spec>) {
      return {work.sequence.kv_start + key, static_cast<int>(work.kv_batch_idx), exists};
    }
    if (!exists) return {0, 0, false};
    const int idx = divide(key, params.page_div_mul, params.page_div_shift);
    const int32_t* g_table = params.block_table + work.tile.batch_idx * params.table_stride;
    const int page = load_index(g_table, idx, params.table_word);
    // A page index beyond the pages is replaced by 0: no other memory is read.
    const bool is_page = static_cast<uint32_t>(page) < params.num_pages;
    return {key - idx * params.page_size, is_page ? page : 0, true};
  }
};

// The list entries of the block that a consumer weighs (attention/warp_scores.cuh: Gathered).
struct ListedBlock {
  uint32_t s_listed;
  __device__ uint32_t listed_addr(int) const { return s_listed; }
};

}  // namespace jitattn

// Which query tile, head, batch and key range a CTA works on.
#pragma once

#include "jitattn/enums.cuh"
#include "jitattn/params.cuh"
#include "jitattn/rows.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

struct WorkTile {
  int q_tile_idx;
  int split_idx;
  int head_idx;  // first query head of the tile
  int batch_idx;
};

// Full: query tiles fastest, so that neighbouring CTAs share the K and V of one head in L2.
// Causal: heads fastest and the last (longest) query tiles first, so that short tiles fill the end
// of the run. (9 to 11 % on causal; notes/0001)
template <class Spec>
__device__ __forceinline__ WorkTile work_tile(const FwdParams& params, uint32_t cta_idx) {
  const uint32_t num_q_tiles = params.num_q_tiles, num_splits = params.num_splits;
  const uint32_t head_tiles = params.heads_q / params.heads_per_tile;
  uint32_t q_tile_idx, split_idx, head_and_batch;
  if constexpr (Spec::kMask == MaskKind::kCausal) {
    const uint32_t num_heads_and_batch = head_tiles * params.batch;
    const uint32_t slower = cta_idx / num_heads_and_batch;
    head_and_batch = cta_idx % num_heads_and_batch;
    split_idx = slower % num_splits;
    q_tile_idx = num_q_tiles - 1 - slower / num_splits;
  } else {
    const uint32_t slower = cta_idx / num_q_tiles;
    q_tile_idx = cta_idx % num_q_tiles;
    split_idx = slower % num_splits;
    head_and_batch = slower / num_splits;
  }
  WorkTile tile;
  tile.q_tile_idx = q_tile_idx;
  tile.split_idx = split_idx;
  tile.head_idx = (head_and_batch % head_tiles) * params.heads_per_tile;
  tile.batch_idx = head_and_batch / head_tiles;
  return tile;
}

// Keys that the query at `position` may see: [0, limit).
template <class Spec>
__device__ __forceinline__ int visible_keys(const FwdParams& params, int position) {
  if constexpr (Spec::kMask == MaskKind::kFull) return params.len_kv;
  return min_of(params.len_kv, position + params.diagonal + 1);
}

struct KvBlockRange {
  int begin;
  int end;
};

// Key blocks that any row of the tile may see, cut evenly into num_splits parts.
template <class Spec>
__device__ __forceinline__ KvBlockRange kv_block_range(const FwdParams& params, const RowMap& rows,
                                                       const WorkTile& tile) {
  const int last_row = min_of((tile.q_tile_idx + 1) * Spec::kBlockQ, rows.num_rows) - 1;
  const int visible = max_of(0, visible_keys<Spec>(params, rows.position(last_row)));
  const int num_blocks = ceil_div(visible, Spec::kBlockKv);
  const int per_split = ceil_div(num_blocks, params.num_splits);
  const int begin = min_of(tile.split_idx * per_split, num_blocks);
  return {begin, min_of(begin + per_split, num_blocks)};
}

}  // namespace jitattn

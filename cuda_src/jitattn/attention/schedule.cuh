// Forward schedule: maps each CTA to a query tile, head, sequence and range of key blocks.
//
// An item is a query tile of one sequence with one part (split) of its keys; every head tile has
// the same items. If all sequences have one length, the item follows from the CTA's index alone. If
// lengths differ, every CTA reads the lengths and counts: the host makes no plan, and a captured
// graph stays valid when lengths change.
#pragma once

#include "jitattn/attention/list_entry.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

struct WorkTile {
  int q_tile_idx;
  int split_idx;
  int num_splits;  // of this query tile
  int head_idx;    // first query head of the tile
  int batch_idx;   // negative: no work for this CTA
  int item;        // index of the tile's first split among all items
};

// Order of the tiles. Full: query tiles fastest, so that neighbouring CTAs share the K and V of one
// head in L2. With a bias matrix: heads fastest, since heads most often share it. Causal: heads
// fastest and the last (longest) query tiles first, so that short tiles fill the tail of the grid.
// (9 to 11 % on causal in an earlier experiment; notes/0001)
template <class Spec>
__device__ __forceinline__ WorkTile uniform_tile(const FwdParams& params, uint32_t cta_idx) {
  const uint32_t num_q_tiles = params.num_q_tiles, num_splits = params.num_splits;
  const uint32_t head_tiles = params.heads_q / params.heads_per_tile;
  uint32_t q_tile_idx, split_idx, head_and_batch;
  if constexpr (Spec::kMask == MaskKind::kCausal || Spec::kMask == MaskKind::kLocalStride ||
                Spec::kBiasStaged == Staging::kMatrix) {
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
  tile.num_splits = num_splits;
  tile.head_idx = (head_and_batch % head_tiles) * params.heads_per_tile;
  tile.batch_idx = head_and_batch / head_tiles;
  tile.item = (tile.batch_idx * num_q_tiles + q_tile_idx) * num_splits;
  return tile;
}

// Numbers of query tiles and key blocks of a sequence.
struct Extent {
  int num_q_tiles;
  int num_kv_blocks;
};

template <class Spec>
__device__ __forceinline__ Extent extent_of(const FwdParamsOf<Spec>& params, int batch_idx) {
  if (batch_idx >= params.batch) return {0, 0};
  const int len_q = q_span<Spec>(params, batch_idx).length;
  int num_rows = len_q * params.heads_per_tile;
  const Span kv = kv_span<Spec>(params, batch_idx);
  if (kHasBlockLists<Spec> && len_q > 0) {
    num_rows += list_shift<Spec>(params, {0, len_q}, kv) * params.heads_per_tile;
  }
  const int num_q_tiles = ceil_div(num_rows, Spec::kBlockQ);
  const int num_kv_blocks = ceil_div(kv.length, Spec::kBlockKv);
  if constexpr (Spec::kMask == MaskKind::kWindow) {
    if (params.left > kNoLeft && !lifts_left<Spec>(params, len_q)) {
      // Upper bound: the reach of a tile's queries at any offset within a block, and the first
      // keys.
      const int positions = min_of(len_q, Spec::kBlockQ);
      const int64_t reach = static_cast<int64_t>(params.diagonal) - params.left + positions;
      const int64_t blocks =
          reach / Spec::kBlockKv + 2 + ceil_div(params.keep_first, Spec::kBlockKv);
      return {num_q_tiles, static_cast<int>(min_of<int64_t>(num_kv_blocks, blocks))};
    }
  }
  if constexpr (Spec::kMask == MaskKind::kLocalStride) {
    // Upper bound, except for dense heads: the local blocks plus one, and every stride-th before
    // them.
    const int per_block = 1 << (params.block_log2 - log2_of(Spec::kBlockKv));
    const int64_t local = static_cast<int64_t>(params.local_blocks + 2) * per_block;
    const int64_t blocks = local + num_kv_blocks / params.stride + per_block;
    return {num_q_tiles, static_cast<int>(min_of<int64_t>(num_kv_blocks, blocks))};
  }
  return {num_q_tiles, num_kv_blocks};
}

__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(0xffffffffu, value); }

// Returns the number of key blocks of the longest balanced item: at most the mean load of a CTA
// slot. extent_at(base): the extent of sequence base + lane. The same in every lane.
template <class Spec, class ExtentAt>
__device__ __forceinline__ int most_blocks_of_item(const FwdParamsOf<Spec>& params, int head_tiles,
                                                   ExtentAt extent_at) {
  constexpr int kFewestBlocks = 4;
  int64_t load = 0;
  int num_tiles = 0;
#pragma unroll 1
  for (int base = 0; base < params.batch; base += 32) {
    const Extent extent = extent_at(base);
    load += warp_sum(extent.num_q_tiles * extent.num_kv_blocks);
    num_tiles += warp_sum(extent.num_q_tiles);
  }
  // The rounding error, about 1e-7, is less than the spare slots of the grid (plan/forward.py).
  const float mean = static_cast<float>(load) * head_tiles / params.num_slots;
  int most_blocks = max_of(kFewestBlocks, static_cast<int>(ceilf(mean)));
  // If all items fit in one wave, rounding up must not begin a second one.
  const int share = max_of(1, params.num_slots / head_tiles);
#pragma unroll 1
  for (int attempt = 0; attempt < 3 && num_tiles <= share; ++attempt) {
    int num_items = 0;
#pragma unroll 1
    for (int base = 0; base < params.batch; base += 32) {
      const Extent extent = extent_at(base);
      const int splits = max_of(1, ceil_div(extent.num_kv_blocks, most_blocks));
      num_items += warp_sum(extent.num_q_tiles * splits);
    }
    if (num_items <= share) break;
    most_blocks = ceil_div(most_blocks * num_items, share);
  }
  return most_blocks;
}

// Inclusive prefix sum over the lanes of a warp.
__device__ __forceinline__ int warp_prefix_sum(int value) {
  const int lane_idx = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, step);
    if (lane_idx >= step) value += other;
  }
  return value;
}

// Finds the item of a CTA by counting; the same in every warp of the CTA. Longer sequences come
// first: in classes of halving length, and in batch order within a class. num_splits = 0: items are
// balanced.
template <class Spec>
__device__ __forceinline__ WorkTile counted_tile(const FwdParamsOf<Spec>& params,
                                                 uint32_t cta_idx) {
  constexpr int kClasses = 4;
  const int lane_idx = threadIdx.x % 32;
  const int head_tiles = params.heads_q / params.heads_per_tile;
  // Read once if one round of lanes holds them all: this is on the way to the first copy.
  const Extent first_extent = extent_of<Spec>(params, lane_idx);
  auto extent_at = [&](int base) {
    return base == 0 ? first_extent : extent_of<Spec>(params, base + lane_idx);
  };
  int most_blocks = params.len_kv;  // one split per tile
  if (params.num_splits == 0)
    most_blocks = most_blocks_of_item<Spec>(params, head_tiles, extent_at);
  auto splits_of = [&](const Extent& extent) {
    if (params.num_splits > 0) return params.num_splits;
    return max_of(1, ceil_div(extent.num_kv_blocks, most_blocks));
  };

  // ---- The sequence that contains this CTA's item
  WorkTile tile;
  tile.batch_idx = -1;
  const int wanted = cta_idx / head_tiles;
  tile.head_idx = (cta_idx % head_tiles) * params.heads_per_tile;
  const int longest = ceil_div(params.len_kv, Spec::kBlockKv);
  int before = 0;  // items of the sequences before
#pragma unroll 1
  for (int length_class = 0; length_class < kClasses; ++length_class) {
    const int most = length_class == 0 ? longest : longest >> length_class;
    const int below = length_class == kClasses - 1 ? -1 : longest >> (length_class + 1);
#pragma unroll 1
    for (int base = 0; base < params.batch; base += 32) {
      const Extent extent = extent_at(base);
      const bool in_class = extent.num_kv_blocks <= most && extent.num_kv_blocks > below;
      const int splits = splits_of(extent);
      const int items = in_class ? extent.num_q_tiles * splits : 0;
      const int upto = warp_prefix_sum(items);
      const uint32_t passed = __ballot_sync(0xffffffffu, before + upto > wanted);
      if (passed != 0) {
        const int lane = __ffs(passed) - 1;
        const int first = before + __shfl_sync(0xffffffffu, upto - items, lane);
        const int num_splits = __shfl_sync(0xffffffffu, splits, lane);
        const int num_q_tiles = __shfl_sync(0xffffffffu, extent.num_q_tiles, lane);
        const int idx = wanted - first;
        tile.batch_idx = base + lane;
        tile.num_splits = num_splits;
        tile.split_idx = idx % num_splits;
        tile.q_tile_idx = num_q_tiles - 1 - idx / num_splits;
        tile.item = wanted - tile.split_idx;
        return tile;
      }
      before += __shfl_sync(0xffffffffu, upto, 31);
    }
  }
  return tile;
}

template <class Spec>
__device__ __forceinline__ WorkTile work_tile(const FwdParamsOf<Spec>& params, uint32_t cta_idx) {
  if constexpr (kIsUniform<Spec>) {
    return uniform_tile<Spec>(params, cta_idx);
  } else {
    return counted_tile<Spec>(params, cta_idx);
  }
}

// Returns the limit of the keys that the query at `position` sees: [0, limit), or with a window
// [first, limit) of them and the first keys. Read from the parameters if all sequences have one
// length: copies in registers make the main loop spill.
template <class Spec>
__device__ __forceinline__ int visible_keys(const FwdParamsOf<Spec>& params,
                                            const Sequence& sequence, int position) {
  const int len_kv = kIsUniform<Spec> ? params.len_kv : sequence.len_kv;
  if constexpr (Spec::kMask == MaskKind::kFull || kHasBlockLists<Spec>) return len_kv;
  return min_of(len_kv, position + 1 + (kIsUniform<Spec> ? params.diagonal : sequence.diagonal));
}

// The local + stride pattern of one kv head.
template <class Spec>
struct LocalStride {
  const FwdScoreParams& params;
  const int shift;  // column j is on the stride if (j + shift) % stride == 0
  const bool is_dense;

  __device__ LocalStride(const FwdScoreParams& params, int head_idx)
      : params(params),
        shift(head_idx / params.heads_per_kv * params.head_step + params.head_shift),
        is_dense(head_idx / params.heads_per_kv >= params.first_dense) {}

  // First key of the local blocks of a query at key position `own`.
  __device__ int first_local(int own) const {
    if (is_dense) return 0;
    return max_of(0, (own >> params.block_log2) - params.local_blocks + 1) << params.block_log2;
  }
  // End of the queries, by key position, that have the block of this key among their local blocks.
  __device__ int64_t end_of_local(int key) const {
    return static_cast<int64_t>((key >> params.block_log2) + params.local_blocks)
           << params.block_log2;
  }
  __device__ int first_column() const {
    const int past = shift % params.stride;
    return past == 0 ? 0 : params.stride - past;
  }
  __device__ bool is_on_stride(int key) const {
    return ((key >> params.block_log2) + shift) % params.stride == 0;
  }
};

// Returns the first key after the gap that the query at `position` sees.
template <class Spec>
__device__ __forceinline__ int first_key(const FwdParamsOf<Spec>& params, const Sequence& sequence,
                                         int head_idx, int position) {
  if constexpr (Spec::kMask == MaskKind::kWindow) {
    return max_of(0, position + (kIsUniform<Spec> ? left_of<Spec>(params, 0) : sequence.left));
  } else if constexpr (kHasStride<Spec>) {
    const int own = position + (kIsUniform<Spec> ? params.diagonal : sequence.diagonal);
    return LocalStride<Spec>(params, head_idx).first_local(max_of(0, own));
  }
  return 0;
}

// Whether a key before first_key is visible nevertheless: a first key, or one on the stride.
template <class Spec>
__device__ __forceinline__ bool is_kept(const FwdParamsOf<Spec>& params, int head_idx, int key) {
  if constexpr (Spec::kMask == MaskKind::kWindow) return key < params.keep_first;
  if constexpr (Spec::kMask == MaskKind::kLocalStride) {
    return LocalStride<Spec>(params, head_idx).is_on_stride(key);
  }
  return false;
}

// The plan of a CTA where sequence lengths differ, kept for the epilogue.
struct CtaPlan {
  WorkTile tile;
  Sequence sequence;
};

// The list entry of a group of 16 keys.
struct ListedGroup {
  int first_key;  // kNoKey: no such group
  uint32_t bits;
  uint32_t whole;  // whole_of
};

constexpr int kNoKey = 0x3ffffff0;

// The window of a head: the query at key position p sees the listed keys in [p + left, p + right],
// and those before keep_first that are not beyond p + right.
struct BlockListHead {
  int right;
  int left;
  int keep_first;
};

// The key blocks of a CTA, numbered without gaps by ordinals: first the kept blocks (of the first
// keys, or on the stride), then all blocks from some block on; or the blocks of a list.
struct KvBlockRange {
  int begin;
  int end;
  int num_kept;
  int gap;               // block - ordinal, after the kept blocks
  int kept_first;        // local + stride: first kept block
  int kept_log2;         // log2 of the kernel blocks in a pattern block
  int kept_step;         // kernel blocks from one kept pattern block to the next
  const int2* g_groups;  // lists: the groups of this tile
  int num_groups;        // number of groups that any row may see
  int num_keys;          // number of their keys that exist
  BlockListHead head;

  __device__ ListedGroup listed_group(int idx, bool is_wanted) const {
    if (!is_wanted || idx >= num_groups) return {kNoKey, 0, ~0u};
    const int2 entry = __ldg(g_groups + idx);
    return {group_of(entry) * 16, static_cast<uint32_t>(entry.y), whole_of(entry)};
  }

  template <class Spec>
  __device__ int block_at(int ordinal) const {
    if constexpr (kHasGap<Spec>) {
      if (ordinal >= num_kept) return ordinal + gap;
      if constexpr (Spec::kMask == MaskKind::kLocalStride) {
        const int within = ordinal & ((1 << kept_log2) - 1);
        return kept_first + (ordinal >> kept_log2) * kept_step + within;
      }
    }
    return ordinal;
  }
};

// Loads a head's list (x: 2 list + 1 if positions below 0 see nothing) and its window.
template <class Spec>
__device__ __forceinline__ int4 load_block_list_head(const FwdBlockListParams& params,
                                                     const Sequence& sequence, int head_idx) {
  // A single query may have another rule.
  const bool is_alone = sequence.len_q - sequence.first_position == 1;
  return __ldg(params.list_heads + (is_alone ? params.heads_q : 0) + head_idx);
}

// The groups listed for a query tile, in ascending order of keys.
struct BlockListSpan {
  const int2* g_groups;
  int count;

  // Number of groups that begin before `key`.
  __device__ int before(int key) const {
    int below = 0, above = count;
    // Fast path: usually all groups do.
    if (above > 0 && group_of(__ldg(g_groups + above - 1)) * 16 < key) below = above;
    while (below < above) {
      const int middle = (below + above) / 2;
      if (group_of(__ldg(g_groups + middle)) * 16 < key) {
        below = middle + 1;
      } else {
        above = middle;
      }
    }
    return below;
  }
};

// Returns the groups of the tile whose first query is at `position`.
__device__ __forceinline__ BlockListSpan listed_span(const FwdBlockListParams& params,
                                                     const Sequence& sequence, const int4& head,
                                                     int position) {
  const int first = position + sequence.diagonal;  // a tile does not straddle 0
  const int list_tile = max_of(first, 0) >> params.list_log2;
  if ((first < 0 && (head.x & 1) != 0) || list_tile >= params.list_tiles) return {nullptr, 0};
  const int2 span =
      __ldg(params.list_spans + static_cast<int64_t>(head.x >> 1) * params.list_tiles + list_tile);
  return {params.list_groups + span.x, span.y};
}

// Finds the listed groups of this tile that any of its rows may see.
template <class Spec>
__device__ __forceinline__ void find_block_list(KvBlockRange& range,
                                                const FwdBlockListParams& params,
                                                const Sequence& sequence, const RowMap& rows,
                                                const WorkTile& tile, int first_row, int last_row) {
  const int4 head = load_block_list_head<Spec>(params, sequence, tile.head_idx);
  range.head = {head.y, head.z, head.w};
  const BlockListSpan span = listed_span(params, sequence, head, rows.position(first_row));
  range.g_groups = span.g_groups;
  const int last = rows.position(last_row) + sequence.diagonal;
  const int count = span.before(min_of(sequence.len_kv, last + 1 + head.y));
  range.num_groups = count;
  if (count == 0) return;
  const int last_key = group_of(__ldg(range.g_groups + count - 1)) * 16;
  range.num_keys = (count - 1) * 16 + min_of(16, sequence.len_kv - last_key);
}

// Returns the key blocks of a CTA: those of the tile, cut evenly into its splits.
template <class Spec>
__device__ __forceinline__ KvBlockRange kv_block_range(const FwdParamsOf<Spec>& params,
                                                       const Sequence& sequence, const RowMap& rows,
                                                       const WorkTile& tile) {
  const int first_row = tile.q_tile_idx * Spec::kBlockQ;
  const int last_row = min_of(first_row + Spec::kBlockQ, rows.num_rows) - 1;
  const int visible = max_of(0, visible_keys<Spec>(params, sequence, rows.position(last_row)));
  int num_blocks = ceil_div(visible, Spec::kBlockKv);
  KvBlockRange range = {};
  if constexpr (kHasBlockLists<Spec>) {
    find_block_list<Spec>(range, params, sequence, rows, tile, first_row, last_row);
    num_blocks = ceil_div(range.num_groups, Spec::kBlockKv / 16);
  }
  if constexpr (kHasGap<Spec>) {
    const int key = first_key<Spec>(params, sequence, tile.head_idx, rows.position(first_row));
    const int first = min_of(key / Spec::kBlockKv, num_blocks);
    if constexpr (Spec::kMask == MaskKind::kWindow) {
      range.num_kept = min_of(first, ceil_div(params.keep_first, Spec::kBlockKv));
    } else {
      static_assert((Spec::kBlockKv & (Spec::kBlockKv - 1)) == 0, "pattern blocks hold whole ones");
      const int column = LocalStride<Spec>(params, tile.head_idx).first_column();
      range.kept_log2 = params.block_log2 - log2_of(Spec::kBlockKv);
      range.kept_first = column << range.kept_log2;
      range.kept_step = params.stride << range.kept_log2;
      const int columns = key >> params.block_log2;  // before the local blocks
      const int kept = columns > column ? ceil_div(columns - column, params.stride) : 0;
      range.num_kept = min_of(first, kept << range.kept_log2);
    }
    range.gap = first - range.num_kept;
    num_blocks -= range.gap;
  }
  const int per_split = ceil_div(num_blocks, tile.num_splits);
  range.begin = min_of(tile.split_idx * per_split, num_blocks);
  range.end = min_of(range.begin + per_split, num_blocks);
  return range;
}

}  // namespace jitattn

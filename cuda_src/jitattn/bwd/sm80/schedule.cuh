// Backward schedule: the query tiles that see a key block, the inverse of the forward schedule
// (attention/schedule.cuh).
#pragma once

#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

struct TileRange {
  int begin;
  int end;

  __device__ bool has(int tile) const { return tile >= begin && tile < end; }

  __device__ bool is_empty() const { return begin >= end; }

  __device__ TileRange within(int first, int last) const {
    return {max_of(begin, first), min_of(end, last)};
  }

  // Returns one of `count` parts of about equal size.
  __device__ TileRange part(int idx, int count) const {
    const int64_t size = max_of(0, end - begin);
    return {begin + static_cast<int>(size * idx / count),
            begin + static_cast<int>(size * (idx + 1) / count)};
  }
};

constexpr int kAllTiles = 0x7fffffff;

struct KvTile {
  int tile;
  int kv_head;
  int batch;
  int split;  // index of the split of its query tiles
};

// Order of the key blocks. Full: key blocks fastest, so that neighbouring CTAs share the Q and dO
// of one head in L2. Otherwise heads fastest: the first key blocks, which most queries see, are
// launched first. In both, the blocks of a head are launched in key order, all splits of one before
// the next, as the dq semaphore requires.
template <class Spec>
__device__ __forceinline__ KvTile kv_tile_of(const BwdParamsOf<Spec>& params, uint32_t cta_idx) {
  const uint32_t num_tiles = params.num_kv_tiles, heads = params.heads_q / params.heads_per_kv;
  const uint32_t num_splits = params.num_q_splits;
  uint32_t tile, head_and_batch, split;
  if constexpr (Spec::kMask == MaskKind::kFull && kIsUniform<Spec>) {
    split = cta_idx % num_splits;
    const uint32_t rest = cta_idx / num_splits;
    tile = rest % num_tiles;
    head_and_batch = rest / num_tiles;
  } else {
    const uint32_t num_heads_and_batch = heads * params.batch;
    const uint32_t rest = cta_idx / num_heads_and_batch;
    head_and_batch = cta_idx % num_heads_and_batch;
    split = rest % num_splits;
    tile = rest / num_splits;
  }
  return {static_cast<int>(tile), static_cast<int>(head_and_batch % heads),
          static_cast<int>(head_and_batch / heads), static_cast<int>(split)};
}

// Local + stride: returns the tiles whose rows all see the keys in [first_key, end_key). The keys
// lie all in blocks on the stride, or all in others.
template <class Spec>
__device__ __forceinline__ TileRange free_of_stride(const Sequence& sequence,
                                                    const LocalStride<Spec>& pattern, bool is_on,
                                                    int first_key, int end_key) {
  constexpr int kBlockQ = Spec::kBlockQ;
  if (end_key > sequence.len_kv) return {0, 0};
  const int begin = ceil_div(max_of(0, end_key - 1 - sequence.diagonal), kBlockQ);
  if (is_on) return {begin, kAllTiles};
  const int64_t end = pattern.end_of_local(first_key) - sequence.diagonal;  // in rows
  return {begin, static_cast<int>(max_of<int64_t>(end, 0) / kBlockQ)};
}

// A key block of one sequence, and the query tiles that see it.
template <class Spec>
struct KeyBlock {
  static constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;
  const BwdParamsOf<Spec>& params;
  const Sequence& sequence;
  const int head_idx;  // a query head, for the mask of its kv head
  const int block;
  const int first_key;
  const int end_key;  // end of its keys that exist
  TileRange free;     // local + stride: tiles whose rows all see every key

  __device__ KeyBlock(const BwdParamsOf<Spec>& params, const Sequence& sequence, int head_idx,
                      int block)
      : params(params),
        sequence(sequence),
        head_idx(head_idx),
        block(block),
        first_key(block * kBlockKv),
        end_key(min_of(first_key + kBlockKv, sequence.len_kv)) {
    if constexpr (Spec::kMask == MaskKind::kLocalStride) {
      const LocalStride<Spec> pattern(params, head_idx);
      const bool is_on = pattern.is_dense || pattern.is_on_stride(first_key);
      free = free_of_stride<Spec>(sequence, pattern, is_on, first_key, first_key + kBlockKv);
    }
  }

  // Returns the query tiles that see any of its keys; block lists are searched among them.
  __device__ TileRange tiles() const {
    int begin = kHasBlockLists<Spec> ? sequence.first_position : 0;  // if that is the end: no tile
    int64_t end = sequence.len_q;
    if constexpr (Spec::kMask == MaskKind::kCausal || kHasGap<Spec>) {
      begin = max_of(0, first_key - sequence.diagonal);
    }
    if constexpr (kHasGap<Spec>) end = min_of(end, end_of_rows());
    if (begin >= end) return {0, 0};
    return {begin / kBlockQ, ceil_div(static_cast<int>(end), kBlockQ)};
  }

  // Whether every row of a tile sees every key.
  __device__ bool is_free(int tile) const {
    if constexpr (kHasBlockLists<Spec>) return false;
    if constexpr (Spec::kMask == MaskKind::kLocalStride) return free.has(tile);
    if (first_key + kBlockKv > sequence.len_kv) return false;
    if constexpr (Spec::kMask == MaskKind::kFull) return true;
    const int first_row = tile * kBlockQ, last_row = first_row + kBlockQ - 1;
    if (first_key + kBlockKv > first_row + sequence.diagonal + 1) return false;
    if constexpr (Spec::kMask == MaskKind::kWindow) {
      if (first_key >= jitattn::first_key<Spec>(params, sequence, head_idx, last_row)) return true;
      return first_key + kBlockKv <= params.keep_first;
    }
    return true;
  }

  // Number of earlier key blocks that see a tile: the semaphore's value when this block may add to
  // dQ.
  __device__ int semaphore_value(int tile) const {
    const int first_row = tile * kBlockQ;
    if constexpr (Spec::kMask == MaskKind::kWindow) {
      const int kept = ceil_div(params.keep_first, kBlockKv);
      const int64_t first = static_cast<int64_t>(first_row) + sequence.left;
      const int near = static_cast<int>(max_of<int64_t>(first, 0) / kBlockKv);
      return min_of(block, kept) + max_of(0, block - max_of(kept, near));
    }
    if constexpr (Spec::kMask == MaskKind::kLocalStride) {
      const LocalStride<Spec> pattern(params, head_idx);
      const int own = max_of(0, first_row + sequence.diagonal);
      const int near = pattern.first_local(own) / kBlockKv;
      return kept_before(pattern, min_of(block, near)) + max_of(0, block - near);
    }
    return block;
  }

 private:
  // End of the rows that see any of its keys.
  __device__ int64_t end_of_rows() const {
    constexpr int64_t kAll = 0x7fffffff;
    if constexpr (Spec::kMask == MaskKind::kWindow) {
      if (sequence.left <= kNoLeft || first_key < params.keep_first) return kAll;
      return static_cast<int64_t>(end_key) - sequence.left;
    } else {
      const LocalStride<Spec> pattern(params, head_idx);
      if (pattern.is_dense || pattern.is_on_stride(first_key)) return kAll;
      return pattern.end_of_local(end_key - 1) - sequence.diagonal;
    }
  }

  // Number of the first `count` key blocks that are on the stride.
  __device__ int kept_before(const LocalStride<Spec>& pattern, int count) const {
    auto columns = [&](int before) {  // on the stride, of the first `before`
      const int first = pattern.first_column();
      return before > first ? ceil_div(before - first, params.stride) : 0;
    };
    const int per_column = (1 << params.block_log2) / kBlockKv;
    const int column = count / per_column;
    const int part = pattern.is_on_stride(column << params.block_log2) ? count % per_column : 0;
    return columns(column) * per_column + part;
  }
};

}  // namespace jitattn

// Which query tiles see a key block: the rules of schedule.cuh, turned around.
#pragma once

#include "jitattn/bwd_traits.cuh"
#include "jitattn/enums.cuh"
#include "jitattn/schedule.cuh"
#include "jitattn/sequence.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

struct TileRange {
  int begin;
  int end;
};

struct KvTile {
  int tile;
  int kv_head;
  int batch;
};

// Full: key blocks fastest, so that neighbouring CTAs share the Q and dO of one head in L2. Else
// heads fastest: the first key blocks, which most queries see, are started first. In both, the
// blocks of a head are started in the order of the keys, which turns rely on.
template <class Spec>
__device__ __forceinline__ KvTile kv_tile_of(const BwdParamsOf<Spec>& params, uint32_t cta_idx) {
  const uint32_t num_tiles = params.num_kv_tiles, heads = params.heads_q / params.heads_per_kv;
  uint32_t tile, head_and_batch;
  if constexpr (Spec::kMask == MaskKind::kFull && kIsUniform<Spec>) {
    tile = cta_idx % num_tiles;
    head_and_batch = cta_idx / num_tiles;
  } else {
    const uint32_t num_heads_and_batch = heads * params.batch;
    tile = cta_idx / num_heads_and_batch;
    head_and_batch = cta_idx % num_heads_and_batch;
  }
  return {static_cast<int>(tile), static_cast<int>(head_and_batch % heads),
          static_cast<int>(head_and_batch / heads)};
}

// A key block of one sequence, as the query tiles see it.
template <class Spec>
struct KeyBlock {
  static constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;
  const BwdParamsOf<Spec>& params;
  const Sequence& sequence;
  const int head_idx;  // a query head; the rules of its kv head
  const int block;
  const int first_key;
  const int end_key;  // after its last key that exists

  __device__ KeyBlock(const BwdParamsOf<Spec>& params, const Sequence& sequence, int head_idx,
                      int block)
      : params(params),
        sequence(sequence),
        head_idx(head_idx),
        block(block),
        first_key(block * kBlockKv),
        end_key(min_of(first_key + kBlockKv, sequence.len_kv)) {}

  // Tiles of queries that see any of its keys; those of a list are searched for among them.
  __device__ TileRange tiles() const {
    int begin = kHasLists<Spec> ? sequence.first_position : 0;  // none if that is the end
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
    if constexpr (kHasLists<Spec>) return false;
    if (first_key + kBlockKv > sequence.len_kv) return false;
    if constexpr (Spec::kMask == MaskKind::kFull) return true;
    const int first_row = tile * kBlockQ, last_row = first_row + kBlockQ - 1;
    if (first_key + kBlockKv > first_row + sequence.diagonal + 1) return false;
    if constexpr (kHasGap<Spec>) {
      if (first_key >= jitattn::first_key<Spec>(params, sequence, head_idx, last_row)) return true;
      if constexpr (Spec::kMask == MaskKind::kWindow) {
        return first_key + kBlockKv <= params.keep_first;
      } else {
        const bool ends_kept = is_kept<Spec>(params, head_idx, first_key + kBlockKv - 1);
        return is_kept<Spec>(params, head_idx, first_key) && ends_kept;
      }
    }
    return true;
  }

  // How many key blocks before this one see a tile: its turn to add to the sums of dQ.
  __device__ int turn(int tile) const {
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
  // After the last row that sees any of its keys.
  __device__ int64_t end_of_rows() const {
    constexpr int64_t kAll = 0x7fffffff;
    if constexpr (Spec::kMask == MaskKind::kWindow) {
      if (sequence.left <= kNoLeft || first_key < params.keep_first) return kAll;
      return static_cast<int64_t>(end_key) - sequence.left;
    } else {
      const LocalStride<Spec> pattern(params, head_idx);
      if (pattern.is_dense || has_stride(pattern)) return kAll;
      const int64_t last_block = (end_key - 1) >> params.block_log2;
      return ((last_block + params.local_blocks) << params.block_log2) - sequence.diagonal;
    }
  }

  // A pattern's blocks are wider than this one, or several of them make it up.
  __device__ bool has_stride(const LocalStride<Spec>& pattern) const {
    const int step = min_of(kBlockKv, 1 << params.block_log2);
    bool has = false;
#pragma unroll 1
    for (int key = first_key; key < end_key; key += step) has |= pattern.is_on_stride(key);
    return has;
  }

  // Key blocks with keys on the stride, of the first `count`.
  __device__ int kept_before(const LocalStride<Spec>& pattern, int count) const {
    const int size = 1 << params.block_log2;
    auto columns = [&](int before) {  // on the stride, of the first `before`
      const int first = pattern.first_column();
      return before > first ? ceil_div(before - first, params.stride) : 0;
    };
    if (kBlockKv >= size) {
      // At stride 1 all of a block's columns are kept, else one at most: strides are no shorter
      // than the columns of a block, or every block has one.
      const int per_block = kBlockKv / size;
      return params.stride <= per_block ? count : columns(count * per_block);
    }
    const int per_column = size / kBlockKv;
    const int column = count / per_column;
    const int part = pattern.is_on_stride(column << params.block_log2) ? count % per_column : 0;
    return columns(column) * per_column + part;
  }
};

}  // namespace jitattn

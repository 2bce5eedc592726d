// Local + stride patterns in blocks of fewer keys than a backward kernel takes at a time.
//
// A column is one of the pattern's blocks of keys. Cut in the order of the keys, a kernel block
// would have columns that all later queries see beside others that few do, and most of its
// products would be hidden. So it gathers columns of one kind: first those on the stride, in kernel
// blocks of their own, then all others. Columns of a block ascend.
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// A kernel block of gathered columns, as KeyBlock is one of neighbouring keys (schedule.cuh).
template <class Spec>
struct GatheredKeys {
  static constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;
  const BwdParamsOf<Spec>& params;
  const Sequence& sequence;
  const LocalStride<Spec> pattern;
  const int block;
  const int stride;       // dense heads: 1, so that all columns are on it
  const int first;        // column on the stride
  const int per_log2;     // columns of a kernel block, as a power of two
  const int num_on;       // columns on the stride,
  const int num_off;      // and others
  const int blocks_on;    // kernel blocks of those on the stride
  const bool is_on;       // of this block's columns
  const int first_idx;    // of this block's columns among those of their kind
  const int num_columns;  // of this block; none: it has no keys
  TileRange free;         // tiles of which every row sees every key

  __device__ GatheredKeys(const BwdParamsOf<Spec>& params, const Sequence& sequence, int head_idx,
                          int block)
      : params(params),
        sequence(sequence),
        pattern(params, head_idx),
        block(block),
        stride(pattern.is_dense ? 1 : params.stride),
        first(pattern.is_dense ? 0 : pattern.first_column()),
        per_log2(log2_of(kBlockKv) - params.block_log2),
        num_on(on_before(ceil_div(sequence.len_kv, 1 << params.block_log2))),
        num_off(ceil_div(sequence.len_kv, 1 << params.block_log2) - num_on),
        blocks_on(blocks_of(num_on)),
        is_on(block < blocks_on),
        first_idx((is_on ? block : block - blocks_on) << per_log2),
        num_columns(max_of(0, min_of(1 << per_log2, (is_on ? num_on : num_off) - first_idx))),
        free(num_keys() < kBlockKv ? TileRange{0, 0}
                                   : free_of_stride<Spec>(sequence, pattern, is_on, key_of(0),
                                                          key_of(kBlockKv - 1) + 1)) {}

  // Keys of this block that exist: its first rows.
  __device__ int num_keys() const {
    if (num_columns == 0) return 0;
    const int last = first_key_of(num_columns - 1);
    const int of_last = min_of(1 << params.block_log2, sequence.len_kv - last);
    return ((num_columns - 1) << params.block_log2) + of_last;
  }

  // The key of a row of this block; of one that exists, where the row does not.
  __device__ int key_of(int row) const {
    const int column = min_of(row >> params.block_log2, num_columns - 1);
    return first_key_of(column) + (row & ((1 << params.block_log2) - 1));
  }

  // Of the 16 keys from this row on.
  __device__ int first_key_of_group(int row) const {
    return row >> params.block_log2 < num_columns ? key_of(row) : kNoKey;
  }

  // Tiles of queries that see any of its keys.
  __device__ TileRange tiles() const {
    const int begin = max_of(0, key_of(0) - sequence.diagonal);
    int64_t end = sequence.len_q;
    if (!is_on) end = min_of(end, pattern.end_of_local(key_of(kBlockKv - 1)) - sequence.diagonal);
    if (begin >= end) return {0, 0};
    return {begin / kBlockQ, ceil_div(static_cast<int>(end), kBlockQ)};
  }

  // Whether every row of a tile sees every key.
  __device__ bool is_free(int tile) const { return free.has(tile); }

  // How many blocks before this one see a tile that this one sees: the semaphore's value when it
  // may add to sums of dQ.
  __device__ int semaphore_value(int tile) const {
    if (is_on) return block;
    const int first_own = tile * kBlockQ + sequence.diagonal;
    const int last_row = min_of((tile + 1) * kBlockQ, sequence.len_q) - 1;
    const int columns = ((last_row + sequence.diagonal) >> params.block_log2) + 1;
    const int on = blocks_of(min_of(num_on, on_before(columns)));
    const int first_seen = max_of(0, (first_own >> params.block_log2) - params.local_blocks + 1);
    const int passed = (first_seen - on_before(first_seen)) >> per_log2;
    return on + block - blocks_on - passed;
  }

 private:
  // Kernel blocks of so many columns.
  __device__ int blocks_of(int count) const { return (count + (1 << per_log2) - 1) >> per_log2; }

  // Columns on the stride of the first `count`.
  __device__ int on_before(int count) const {
    return count > first ? ceil_div(count - first, stride) : 0;
  }

  // Number of the idx-th column of this block.
  __device__ int column(int idx) const {
    const int of_kind = first_idx + idx;
    if (is_on) return first + of_kind * stride;
    if (of_kind < first) return of_kind;
    const int past = of_kind - first, others = stride - 1;  // from one on the stride to the next
    return first + 1 + past / others * stride + past % others;
  }

  __device__ int first_key_of(int idx) const { return column(idx) << params.block_log2; }
};

// The key of row `row` of a kernel block.
template <class Spec>
__device__ __forceinline__ auto keys_of_block(const BwdParamsOf<Spec>& params,
                                              const Sequence& sequence, int kv_head_idx,
                                              int block) {
  if constexpr (kGathersKeys<Spec>) {
    const GatheredKeys<Spec> keys(params, sequence, kv_head_idx * params.heads_per_kv, block);
    return [keys](int row) { return keys.key_of(row); };
  } else {
    return [first_key = block * Spec::kBlockKv](int row) { return first_key + row; };
  }
}

// r_s: scores of rows first_row .. and of the keys of this warp; hidden ones become -inf. is_on:
// those of the block are on the stride.
template <class Spec, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void mask_gathered(float (&r_s)[kRowTiles][kKeyTiles][4],
                                              const FwdParamsOf<Spec>& params,
                                              const Sequence& sequence, const RowMap& rows,
                                              const KeyColumns<Spec>& columns, bool is_on,
                                              int first_row, int lane_idx) {
  static_assert(kKeyTiles <= 8, "KeyColumns has four groups");
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
    const int key = columns(n);
    const int end = ((key >> params.block_log2) + params.local_blocks) << params.block_log2;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + m * 16 + accumulator_row(lane_idx, half);
        const int position = rows.position(row);
        const int own = position + (kIsUniform<Spec> ? params.diagonal : sequence.diagonal);
        const int limit = visible_keys<Spec>(params, sequence, position);
        const bool is_near = is_on || own < end;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = r_s[m][n][2 * half + i];
          score = is_near && key + i < limit ? score : -infinity();
        }
      }
    }
  }
}

}  // namespace jitattn

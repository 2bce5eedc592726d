// Local + stride patterns whose blocks have fewer keys than a backward key block.
//
// A column is one of the pattern's blocks of keys. Split in key order, a kernel block would mix
// columns that all later queries see with columns that few do, and most of its products would be
// hidden. So it gathers columns of one kind: first those on the stride, in kernel blocks of their
// own, then all others. Columns of a block ascend.
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

// A kernel block of gathered columns; the counterpart of KeyBlock (schedule.cuh).
template <class Spec>
struct GatheredKeys {
  static constexpr int kBlockQ = Spec::kBlockQ, kBlockKv = Spec::kBlockKv;
  const BwdParamsOf<Spec>& params;
  const Sequence& sequence;
  const LocalStride<Spec> pattern;
  const int block;
  const int stride;       // 1 for dense heads: all columns are on it
  const int first;        // first column on the stride
  const int per_log2;     // log2 of the columns in a kernel block
  const int num_on;       // number of columns on the stride
  const int num_off;      // number of other columns
  const int blocks_on;    // kernel blocks of columns on the stride
  const bool is_on;       // whether this block's columns are on the stride
  const int first_idx;    // index of its first column among those of its kind
  const int num_columns;  // in this block; 0: it has no keys
  TileRange free;         // tiles whose rows all see every key

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

  // Number of keys of this block that exist: its first rows.
  __device__ int num_keys() const {
    if (num_columns == 0) return 0;
    const int last = first_key_of(num_columns - 1);
    const int of_last = min_of(1 << params.block_log2, sequence.len_kv - last);
    return ((num_columns - 1) << params.block_log2) + of_last;
  }

  // Returns the key of a row of this block; an existing key if the row does not exist.
  __device__ int key_of(int row) const {
    const int column = min_of(row >> params.block_log2, num_columns - 1);
    return first_key_of(column) + (row & ((1 << params.block_log2) - 1));
  }

  // Returns the first of the 16 keys from this row on; kNoKey if they do not exist.
  __device__ int first_key_of_group(int row) const {
    return row >> params.block_log2 < num_columns ? key_of(row) : kNoKey;
  }

  // Returns the query tiles that see any of its keys.
  __device__ TileRange tiles() const {
    const int begin = max_of(0, key_of(0) - sequence.diagonal);
    int64_t end = sequence.len_q;
    if (!is_on) end = min_of(end, pattern.end_of_local(key_of(kBlockKv - 1)) - sequence.diagonal);
    if (begin >= end) return {0, 0};
    return {begin / kBlockQ, ceil_div(static_cast<int>(end), kBlockQ)};
  }

  // Whether every row of a tile sees every key.
  __device__ bool is_free(int tile) const { return free.has(tile); }

  // Number of earlier blocks that see a tile: the semaphore's value when this block may add to dQ.
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
  // Kernel blocks needed for `count` columns.
  __device__ int blocks_of(int count) const { return (count + (1 << per_log2) - 1) >> per_log2; }

  // Number of the first `count` columns that are on the stride.
  __device__ int on_before(int count) const {
    return count > first ? ceil_div(count - first, stride) : 0;
  }

  // Returns the number of the idx-th column of this block.
  __device__ int column(int idx) const {
    const int of_kind = first_idx + idx;
    if (is_on) return first + of_kind * stride;
    if (of_kind < first) return of_kind;
    const int past = of_kind - first, others = stride - 1;  // columns between two on the stride
    return first + 1 + past / others * stride + past % others;
  }

  __device__ int first_key_of(int idx) const { return column(idx) << params.block_log2; }
};

// Returns the key of row `row` of a kernel block.
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

// Sets hidden scores to -inf. r_s: scores of rows first_row .. and of this warp's keys. is_on: the
// block's columns are on the stride.
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

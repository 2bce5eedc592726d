// The work of a CTA: a query tile of one sequence and a range of its key blocks.
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct CtaWork {
  const FwdParamsOf<Spec>& params;
  const WorkTile tile;
  const Sequence sequence;
  const RowMap rows;
  const KvBlockRange range;
  const int64_t kv_head_idx;
  const int64_t kv_batch_idx;

  __device__ __forceinline__ CtaWork(const FwdParamsOf<Spec>& params, const WorkTile& tile)
      : CtaWork(params, tile, Sequence::of<Spec>(params, tile.batch_idx)) {}

  __device__ __forceinline__ CtaWork(const FwdParamsOf<Spec>& params, const WorkTile& tile,
                                     const Sequence& sequence)
      : params(params),
        tile(tile),
        sequence(sequence),
        rows(params, sequence.len_q),
        range(kv_block_range<Spec>(params, sequence, rows, tile)),
        kv_head_idx(tile.head_idx / params.heads_per_kv),
        kv_batch_idx(kv_row<Spec>(params, tile.batch_idx)) {}

  // With a range that was derived before.
  __device__ __forceinline__ CtaWork(const FwdParamsOf<Spec>& params, const WorkTile& tile,
                                     const Sequence& sequence, const KvBlockRange& range)
      : params(params),
        tile(tile),
        sequence(sequence),
        rows(params, sequence.len_q),
        range(range),
        kv_head_idx(tile.head_idx / params.heads_per_kv),
        kv_batch_idx(kv_row<Spec>(params, tile.batch_idx)) {}

  // Batch row of K. INT8 K is never paged: each sequence has its own row (prepare/quantize.cuh).
  __device__ int64_t k_batch_idx() const {
    return kIsQuantized<Spec> ? tile.batch_idx : kv_batch_idx;
  }

  __device__ int first_row() const { return tile.q_tile_idx * Spec::kBlockQ; }

  // Read from the parameters if all sequences have one length, which saves registers.
  __device__ int len_kv() const { return kIsUniform<Spec> ? params.len_kv : sequence.len_kv; }

  __device__ int block_at(int ordinal) const { return range.template block_at<Spec>(ordinal); }

  // Number of keys from the first one of a block to the end of the sequence.
  __device__ int keys_left(int ordinal) const {
    return (kHasBlockLists<Spec> ? range.num_keys : len_kv()) - block_at(ordinal) * Spec::kBlockKv;
  }
};

}  // namespace jitattn

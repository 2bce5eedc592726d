// The work of a CTA: a key block of one kv head, and the steps over the query tiles that see it, of
// one query head after the other.
#pragma once

#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/schedule.cuh"
#include "jitattn/bwd/sm90/row_intervals.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/ptx/special.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Order of the key blocks: in sections of section_heads heads, whose Q and dO the L2 holds together;
// in a section, key blocks ascend and heads are fastest. Causal key blocks are so launched longest
// first; and the blocks of a head in order, all splits of one before the next, as the dq semaphore
// requires.
template <class Spec>
__device__ __forceinline__ KvTile
kv_tile_in_sections(const typename BwdSm90Traits<Spec>::Params& params, uint32_t cta_idx) {
  const uint32_t heads = params.heads_q / params.heads_per_kv, all = heads * params.batch;
  const uint32_t parts = params.num_kv_tiles * params.num_q_splits;
  const uint32_t of_section = params.section_heads * parts;
  const uint32_t first_head = cta_idx / of_section * params.section_heads;
  const uint32_t within = cta_idx % of_section;
  const uint32_t count = min_of<uint32_t>(params.section_heads, all - first_head);
  const uint32_t head = first_head + within % count, part = within / count;
  return {static_cast<int>(part / params.num_q_splits), static_cast<int>(head % heads),
          static_cast<int>(head / heads), static_cast<int>(part % params.num_q_splits)};
}

// A query tile of a head.
struct QueryStep {
  int head;  // among those of the kv head
  int tile;
};

template <class Spec>
struct BwdSm90Work {
  using Params = typename BwdSm90Traits<Spec>::Params;

  const Params& params;
  const KvTile own;
  const Sequence sequence;
  const int first_key;
  const int num_keys;  // of the block that exist
  TileRange tiles;     // of every head: all heads of a kv head have the same mask

  __device__ __forceinline__ explicit BwdSm90Work(const Params& params)
      : params(params),
        own(kv_tile_in_sections<Spec>(params, ptx::cta_idx())),
        sequence(Sequence::of<Spec>(params, own.batch)),
        first_key(own.tile * Spec::kBlockKv),
        num_keys(min_of(Spec::kBlockKv, sequence.len_kv - first_key)) {
    TileRange any = {0, 0};
#pragma unroll
    for (int key = 0; key < Spec::kBlockKv; key += 64) {
      any = joined(any,
                   tiles_that_see_any<Spec>(params, sequence, first_head(), first_key + key, 64));
    }
    tiles = any.within(params.first_q_tile, params.end_q_tile).part(own.split, params.num_q_splits);
  }

  // Returns the least range with two others.
  __device__ static TileRange joined(const TileRange& one, const TileRange& other) {
    if (one.is_empty()) return other;
    if (other.is_empty()) return one;
    return {min_of(one.begin, other.begin), max_of(one.end, other.end)};
  }

  __device__ int first_head() const { return own.kv_head * params.heads_per_kv; }
  __device__ int num_steps() const {
    return max_of(0, tiles.end - tiles.begin) * params.heads_per_kv;
  }
  __device__ QueryStep first_step() const { return {0, tiles.begin}; }
  // Returns whether the next step is of another head.
  __device__ bool advance(QueryStep& step) const {
    const bool ends = ++step.tile == tiles.end;
    if (ends) {
      step.tile = tiles.begin;
      ++step.head;
    }
    return ends;
  }
};

}  // namespace jitattn

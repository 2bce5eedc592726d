// Destinations of a CTA's rows in the output, the LSE and the partial results.
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct OutputRows {
  using Element = typename Conditional<Spec::kOutDtype == Dtype::kFp32, float, uint16_t>::type;

  const FwdParamsOf<Spec>& params;
  const WorkTile tile;
  const Sequence sequence;
  const RowMap rows;

  __device__ OutputRows(const FwdParamsOf<Spec>& params, const CtaPlan& plan)
      : params(params),
        tile(plan.tile),
        sequence(plan.sequence),
        rows(params, plan.sequence.len_q) {}

  struct Place {
    int position;  // in the tensor, with the sequence's first row added
    int head;
    bool exists;
  };

  __device__ Place place_of(int row_in_tile) const {
    const int row = tile.q_tile_idx * Spec::kBlockQ + row_in_tile;
    const int position = rows.position(row);
    return {sequence.q_start + position, tile.head_idx + rows.head(row, position),
            row < rows.num_rows && (!kHasBlockLists<Spec> || position >= sequence.first_position)};
  }

  __device__ int64_t lse_index(const Place& place) const {
    return tile.batch_idx * params.lse_stride_batch + place.head * params.lse_stride_head +
           place.position;
  }

  __device__ Element* out_row(const Place& place) const {
    return static_cast<Element*>(params.out) + tile.batch_idx * params.out_stride_batch +
           place.position * params.out_stride_row + place.head * params.out_stride_head;
  }

  // Number of rows of the tile that exist, with those before a list's first query.
  __device__ int num_rows() const {
    return min_of(Spec::kBlockQ, rows.num_rows - tile.q_tile_idx * Spec::kBlockQ);
  }

  // First row of the partial result of a split.
  __device__ int64_t partial_row(int split_idx) const {
    const int head_tiles = params.heads_q / params.heads_per_tile;
    return (static_cast<int64_t>(tile.item + split_idx) * head_tiles + head_tile_idx()) *
           Spec::kBlockQ;
  }

  __device__ int head_tile_idx() const { return tile.head_idx / params.heads_per_tile; }
};

}  // namespace jitattn

// Kernel      Makes block lists of a traced mask: the blocks of kMaskBlock x kMaskBlock pairs that
//             have any that it sees, and of which it hides none. Nothing waits for the device: a
//             list has room for all groups.
//
// Work split  A CTA makes the list of a query tile: 2^list_log2 rows, of one head or of all alike. A
//             warp looks at a block, and ends once one pair was seen and one hidden, in any
//             sequence. Then threads write the groups of their blocks, in order.
#pragma once

#include "jitattn/attention/function_math.cuh"
#include "jitattn/attention/list_entry.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

constexpr int kMaskBlock = kWholeRows;  // rows and keys of a block
constexpr int kMaskGroup = 16;          // keys of a group of a list

// What a key block is to the rows of a tile.
struct MaskCells {
  uint32_t cells;  // of 8 rows, of the row blocks in which anything is seen (BlockListArguments)
  uint32_t whole;  // row blocks in which nothing is hidden
};

template <class Spec, class Params>
struct MaskTile {
  const Params& params;
  const int lane_idx;
  const int head_idx;
  const int first_row;

  // Looks at the blocks of rows of a key block.
  __device__ MaskCells look(int block) const {
    constexpr uint32_t kCells = (1u << kMaskBlock / 8) - 1;
    MaskCells found = {0, 0};
#pragma unroll 1
    for (int row = 0; row < 1 << params.list_log2; row += kMaskBlock) {
      bool sees_any, hides_any;
      look(first_row + row, block * kMaskBlock, sees_any, hides_any);
      if (sees_any) found.cells |= kCells << row / 8;
      if (!hides_any) found.whole |= 1u << row / kMaskBlock;
    }
    return found;
  }

 private:
  // A lane has every eighth row and every fourth key: what depends on one of them alone is computed
  // once for each.
  __device__ void look(int row, int key, bool& sees_any, bool& hides_any) const {
    using Function = typename Spec::Function;
    sees_any = hides_any = false;
    constexpr int kLaneKeys = kMaskBlock / 4;
    const int last_row = params.len_q - 1, last_key = params.len_kv - 1;
    ScorePlace place;
    place.head = head_idx;
    place.shift = params.shift;
#pragma unroll 1
    for (int batch = 0; batch < params.batch; ++batch) {
      place.batch = batch;
      typename Function::KeyValues keys[kLaneKeys];
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        place.key = min_of(key + i * 4 + lane_idx % 4, last_key);
        keys[i] = Function::key_values(params, place);
      }
#pragma unroll 1
      for (int first = 0; first < kMaskBlock; first += 8) {
        place.row = min_of(row + first + lane_idx / 4, last_row);
        const typename Function::RowValues values = Function::row_values(params, place);
        bool sees = false, hides = false;
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i) {
          place.key = min_of(key + i * 4 + lane_idx % 4, last_key);
          const bool is_seen = Function::sees(params, place, values, keys[i]);
          sees |= is_seen;
          hides |= !is_seen;
        }
        sees_any |= __any_sync(0xffffffffu, sees && row + first < params.len_q);
        hides_any |= __any_sync(0xffffffffu, hides);
        if (sees_any && hides_any) return;
      }
    }
  }
};

template <class Spec, class Params>
__device__ __forceinline__ void mask_lists(const Params& params) {
  static_assert(sizeof(Params) == Spec::kParamsBytes, "host and device disagree");
  constexpr int kThreads = Spec::kNumThreads, kWarps = kThreads / 32;
  __shared__ MaskCells s_cells[kThreads];
  __shared__ int s_counts[kWarps];
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int list_idx = blockIdx.x / params.list_tiles, tile_idx = blockIdx.x % params.list_tiles;
  const MaskTile<Spec, Params> tile = {params, lane_idx, list_idx, tile_idx << params.list_log2};
  if (blockIdx.x == 0) {  // every head has its list, or the only one, and no window
    constexpr int kOpen = 1 << 29;
    for (int i = threadIdx.x; i < 2 * params.heads_q; i += kThreads) {
      const int own = params.num_lists == 1 ? 0 : i % params.heads_q;
      params.list_heads[i] = make_int4(2 * own + 1, kOpen, -kOpen, 0);
    }
  }

  const int num_blocks = tile.first_row < params.len_q ? ceil_div(params.len_kv, kMaskBlock) : 0;
  const int begin = blockIdx.x * params.tile_groups;
  int count = 0;
#pragma unroll 1
  for (int first = 0; first < num_blocks; first += kThreads) {
    const int end = min_of(kThreads, num_blocks - first);
    for (int i = warp_idx; i < end; i += kWarps) {
      const MaskCells found = tile.look(first + i);
      if (lane_idx == 0) s_cells[i] = found;
    }
    __syncthreads();
    const int own = threadIdx.x;
    const MaskCells found = own < end ? s_cells[own] : MaskCells{0, 0};
    const uint32_t cells = found.cells | found.cells << 16;
    const int left = params.len_kv - (first + own) * kMaskBlock;
    const int groups = cells == 0 ? 0 : min_of(kMaskBlock / kMaskGroup, ceil_div(left, kMaskGroup));
    int before = groups;  // an inclusive sum over the warp
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, step);
      if (lane_idx >= step) before += other;
    }
    if (lane_idx == 31) s_counts[warp_idx] = before;
    __syncthreads();
    int at = count + before - groups;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < warp_idx) at += s_counts[warp];
      count += s_counts[warp];
    }
    for (int i = 0; i < groups; ++i) {
      const int group = (first + own) * (kMaskBlock / kMaskGroup) + i;
      const int entry = static_cast<int>(found.whole << kWholeShift | group);
      params.list_groups[begin + at + i] = make_int2(entry, static_cast<int>(cells));
    }
    __syncthreads();  // the counts are read
  }
  if (threadIdx.x == 0) params.list_spans[blockIdx.x] = make_int2(begin, count);
}

}  // namespace jitattn

// Dropout: draws the attention weights to keep from a counter-based generator without state.
//
// PAPER: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-7).
//
// One call yields the 16-bit random numbers of 8 weights: of query i and the keys j with equal
// j / 32 and equal j % 8 / 2. Counter: (j / 32 * 4 + j % 8 / 2, i, batch * Hq + head, low half of
// the offset). The number is word j % 32 / 8 of the result, its high half for odd j. A weight is
// kept if its number is at least p. Key: the halves of the seed, mixed with the high half of the
// offset.
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

struct Philox {
  uint32_t word[4];

  __device__ static Philox of(uint32_t x, uint32_t y, uint32_t z, uint32_t w, uint32_t key0,
                              uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint64_t first = static_cast<uint64_t>(x) * 0xD2511F53u;
      const uint64_t second = static_cast<uint64_t>(z) * 0xCD9E8D57u;
      x = static_cast<uint32_t>(second >> 32) ^ y ^ key0;
      y = static_cast<uint32_t>(second);
      z = static_cast<uint32_t>(first >> 32) ^ w ^ key1;
      w = static_cast<uint32_t>(first);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    return {{x, y, z, w}};
  }
};

// The generator's key and the last word of its counter, read from a dropout_state.
struct DropoutKey {
  uint32_t key0, key1;
  uint32_t offset;

  // NOTE: two steps, so that a bit of the offset never changes the key as a bit of the seed does.
  __device__ explicit DropoutKey(const int64_t* state) {
    const uint64_t seed = __ldg(state), whole_offset = __ldg(state + 1);
    const uint32_t high = static_cast<uint32_t>(whole_offset >> 32);
    key0 = static_cast<uint32_t>(seed) + high;
    key1 = static_cast<uint32_t>(seed >> 32) + high * 0x85EBCA6Bu;
    offset = static_cast<uint32_t>(whole_offset);
  }
};

// The attention weights of a warp in one step that dropout keeps.
template <class Spec, int kRowTiles, int kKeyTiles>
struct KeptWeights {
  static_assert(kKeyTiles <= 16, "two bits for each n8 tile");
  uint32_t bits[kRowTiles][2];

  // Draws the numbers for a warp's rows (tile/warp_rows.cuh) and keys.
  template <class WarpRows>
  __device__ void draw(const FwdParamsOf<Spec>& params, const Sequence& sequence,
                       const RowMap& rows, int batch_idx, int first_head, const WarpRows& warp_rows,
                       const KeyColumns<Spec>& columns) {
    const DropoutKey state(params.dropout_state);
    // Spans of 32 keys, or half spans if a warp's keys may begin in the middle of one.
    constexpr bool kIsWhole = kKeyTiles % 4 == 0 && !kHasGroups<Spec>;
    constexpr int kTiles = kIsWhole ? 4 : 2;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_rows(m, half);
        const int position = rows.position(row);
        const uint32_t stream = batch_idx * params.heads_q + first_head + rows.head(row, position);
        uint32_t kept = 0;
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += kTiles) {
          const uint32_t key = columns(n);
          const Philox drawn = Philox::of(key / 32 * 4 + (warp_rows.lane_idx & 3),
                                          matrix_row<Spec>(sequence, position), stream,
                                          state.offset, state.key0, state.key1);
          const bool is_second = !kIsWhole && key % 32 >= 16;
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const uint32_t word = is_second ? drawn.word[2 + i % 2] : drawn.word[i];
            kept |= ((word & 0xffff) >= params.dropout_threshold ? 1u : 0u) << (2 * (n + i));
            kept |= ((word >> 16) >= params.dropout_threshold ? 2u : 0u) << (2 * (n + i));
          }
        }
        bits[m][half] = kept;
      }
    }
  }

  // Whether column i of n8 tile n is kept, in row `half` of row tile m.
  __device__ bool keeps(int m, int half, int n, int i) const {
    return (bits[m][half] >> (2 * n + i) & 1) != 0;
  }

  // Sets the dropped weights of n8 tile n to 0.
  __device__ void apply(float (&tile)[4], int m, int n) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        tile[2 * half + i] = keeps(m, half, n, i) ? tile[2 * half + i] : 0.f;
      }
    }
  }
};

}  // namespace jitattn

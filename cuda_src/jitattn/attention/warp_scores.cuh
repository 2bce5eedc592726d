// Operations on a warp's scores of a key block other than the products: tests which blocks its rows
// see, adds score modifications, and applies the masks.
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/dropout.cuh"
#include "jitattn/attention/function.cuh"
#include "jitattn/attention/mask.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/score.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Ordinals of the blocks that every row sees entirely, where there is a gap: blocks of the window,
// and of the first keys.
struct WholeBlocks {
  int begin;
  int end;
  int end_of_kept;

  __device__ bool has(int ordinal) const {
    return (ordinal >= begin && ordinal < end) || ordinal < end_of_kept;
  }
};

// A warp's part of a score tile: its rows, and the keys of its column of warps.
struct WarpPart {
  int lane_idx;
  int first_row;
  int first_key;
  int warp_kv;
  int first_joint_row;  // of the warps that must take the same branches
};

// Required of Traits: Scores, kRowTiles and kKeyTiles, the accumulator tiles of a warp; Rows, its
// rows (tile/warp_rows.cuh); kWarpKeys; kJointRows, the number of rows whose warps must take the
// same branches; kIsStaged, kStagesBias and kStagesDense, and where the tiles of staged matrices
// lie. Required of Gathered: listed_addr, where there are block lists.
template <class Spec, class Traits, class Gathered>
struct WarpScores {
  using Scores = typename Traits::Scores;
  using Kept = KeptWeights<Spec, Traits::kRowTiles, Traits::kKeyTiles>;
  static constexpr bool kIsCapped = Spec::kSoftcap == Switch::kOn;
  static constexpr bool kDrops = Spec::kDropout == Switch::kOn;

  const CtaWork<Spec>& work;
  const Gathered& gathered;
  const uint32_t s_addr;  // of the CTA's storage
  const WarpPart part;
  const typename Traits::Rows rows;  // of the sequence

  __device__ __forceinline__ WarpScores(const CtaWork<Spec>& work, const Gathered& gathered,
                                        uint32_t s_addr, const WarpPart& part)
      : work(work),
        gathered(gathered),
        s_addr(s_addr),
        part(part),
        rows{work.first_row() + part.first_row, part.lane_idx} {}

  // Whether any row sees any key of a block.
  __device__ bool is_seen(int block) const {
    const int begin = block * Spec::kBlockKv, end = begin + Spec::kBlockKv;
    if (!kHasBlockLists<Spec> && begin >= last_sees()) return false;
    if constexpr (kHasGap<Spec>) {
      return is_kept<Spec>(work.params, work.tile.head_idx, begin) ||
             end >
                 first_key<Spec>(work.params, work.sequence, work.tile.head_idx, first_position());
    }
    return true;
  }

  // Whether some key of a block is hidden from any row, in a range without a gap.
  __device__ bool is_cut(int ordinal) const {
    return (ordinal + 1) * Spec::kBlockKv > first_sees();
  }

  // Returns the blocks without hidden keys, in a range with a gap.
  __device__ __forceinline__ WholeBlocks whole_blocks() const {
    const KvBlockRange& range = work.range;
    const int seen = max_of(0, first_sees());
    const int first =
        first_key<Spec>(work.params, work.sequence, work.tile.head_idx, last_position());
    int end_of_kept = range.num_kept;  // local + stride: kept blocks precede every row's own block
    if constexpr (Spec::kMask == MaskKind::kWindow) {
      end_of_kept = min_of(min_of(work.params.keep_first, seen) / Spec::kBlockKv, end_of_kept);
    }
    return {max_of(ceil_div(first, Spec::kBlockKv) - range.gap, range.num_kept),
            seen / Spec::kBlockKv - range.gap, end_of_kept};
  }

  // ---- Before, around and after Q K^T
  // Adds biases before the wait for copies, so that their loads overlap it.
  template <bool kIsMasked>
  __device__ __forceinline__ void add_early(Scores& r_s, int block, int stage) const {
    if constexpr (!kIsCapped && !Traits::kIsStaged) {
      if (!kIsMasked || is_seen(block)) change(r_s, block, stage);
    }
  }

  // Adds staged biases before the product; their tiles have arrived.
  __device__ __forceinline__ void add_staged(Scores& r_s, int block, int stage) const {
    if constexpr (!kIsCapped && Traits::kIsStaged) change(r_s, block, stage);
  }

  // Applies softcap after the product, then the biases, the function and the staged mask.
  __device__ __forceinline__ void cap(Scores& r_s, int block, int stage) const {
    if constexpr (kIsCapped) {
      cap_scores<Spec>(r_s, work.params);
      change(r_s, block, stage);
    }
    apply(r_s, block);
    if constexpr (Traits::kStagesDense) {
      hide_staged<Spec>(r_s, rows,
                        s_addr + Traits::kOffsetDense + stage * Traits::kBytesDense +
                            part.first_row * Traits::StagedDense::kPitch + part.first_key);
    }
  }

  // Applies softcap and adds biases after the product, where it does not add to its accumulators.
  __device__ __forceinline__ void modify(Scores& r_s, int block) const {
    if constexpr (kIsCapped) cap_scores<Spec>(r_s, work.params);
    change(r_s, block, 0);
  }

  // Applies the function of the call, which sees what all the others made of the scores.
  __device__ __forceinline__ void apply(Scores& r_s, int block) const {
    if constexpr (Spec::kHasFunction) {
      apply_function<Spec, false>(r_s, r_s, work.params, work.sequence, work.rows,
                                  work.tile.batch_idx, work.tile.head_idx, rows, columns_of(block));
    }
  }

  // Applies the positional mask or the block list.
  __device__ __forceinline__ void mask(Scores& r_s, int block) const {
    if constexpr (kHasBlockLists<Spec>) {
      const uint32_t s_listed = columns_of(block).s_listed;
      if (!sees_all_listed<Spec, Traits::kKeyTiles>(work.params, work.sequence, work.range.head,
                                                    s_listed, first_position(), last_position())) {
        mask_listed<Spec>(r_s, work.params, work.sequence, work.rows, work.range.head, s_listed,
                          rows);
      }
    } else {
      mask_scores<Spec>(r_s, work.params, work.sequence, work.rows, work.tile.head_idx, rows,
                        block * Spec::kBlockKv + first_masked_key());
    }
  }

  // Draws the weights that dropout keeps.
  __device__ __forceinline__ Kept draw_kept(int block) const {
    Kept kept = {};
    if constexpr (kDrops) {
      kept.draw(work.params, work.sequence, work.rows, work.tile.batch_idx, work.tile.head_idx,
                rows, columns_of(block));
    }
    return kept;
  }

 private:
  // ---- Limits of the first and last of the rows whose warps branch together, derived again where
  // needed to save registers.
  static constexpr bool kIsAlone = Traits::kJointRows == Traits::kWarpRows;
  __device__ int first_joint_row() const { return work.first_row() + part.first_joint_row; }
  __device__ int first_position() const {
    return work.rows.position(kIsAlone ? rows.first : first_joint_row());
  }
  __device__ int last_position() const {
    return work.rows.position(kIsAlone ? rows.template last<Traits::kRowTiles>()
                                       : first_joint_row() + Traits::kJointRows - 1);
  }
  __device__ int first_sees() const { return sees(first_position()); }
  __device__ int last_sees() const { return sees(last_position()); }
  __device__ int sees(int position) const {
    return visible_keys<Spec>(work.params, work.sequence, position);
  }

  // Ragged and paged kernels, and those with a gap, have no register to hold the first key for the
  // mask alone.
  static constexpr bool kKeepsFirstKey =
      kAddsToScores<Spec> || Spec::kHasFunction || (kIsUniform<Spec> && !kHasGap<Spec>);
  __device__ int first_masked_key() const {
    return kKeepsFirstKey ? part.first_key : part.warp_kv * Traits::kWarpKeys;
  }

  __device__ KeyColumns<Spec> columns_of(int block) const {
    const int column = accumulator_column(part.lane_idx);
    if constexpr (kHasBlockLists<Spec>) {
      return {column, gathered.listed_addr(block) + part.first_key / 16 * 8};
    }
    return {block * Spec::kBlockKv + part.first_key + column, 0};
  }

  __device__ __forceinline__ void change(Scores& r_s, int block, int stage) const {
    if constexpr (kAddsToScores<Spec>) {
      uint32_t s_bias = 0;
      if constexpr (Traits::kStagesBias) {
        constexpr int kPitch = Spec::kBiasStaged == Staging::kRow ? 0 : Traits::StagedBias::kPitch;
        s_bias = s_addr + Traits::kOffsetBias + stage * Traits::kBytesBias +
                 part.first_row * kPitch +
                 part.first_key * static_cast<int>(sizeof(typename Traits::Bias::type));
      }
      add_to_scores<Spec>(r_s, work.params, work.sequence, work.rows, work.tile.batch_idx,
                          work.tile.head_idx, rows, columns_of(block), s_bias);
    }
  }
};

}  // namespace jitattn

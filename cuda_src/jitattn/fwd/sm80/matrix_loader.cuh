// Loads the tiles of a bias and of a dense mask for a key block (staged_matrix.cuh).
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/fwd/sm80/gathered_rows.cuh"
#include "jitattn/fwd/sm80/traits.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct MatrixLoader {
  using Traits = FwdTraits<Spec>;

  const CtaWork<Spec>& work;
  const GatheredRows<Spec>& gathered;
  const uint32_t s_addr;  // of the CTA's storage

  // Starts copying the tiles of a block into buffer `stage`.
  __device__ __forceinline__ void load(int stage, int block) const {
    const FwdParamsOf<Spec>& params = work.params;
    const int64_t batch_idx = work.tile.batch_idx;
    if constexpr (Traits::kStagesBias) {
      using T = typename Traits::Bias::type;
      load_tile<typename Traits::StagedBias>(
          s_addr + Traits::kOffsetBias + stage * Traits::kBytesBias, block,
          static_cast<const T*>(params.bias) + batch_idx * params.bias_stride_batch,
          params.bias_stride_head, params.bias_stride_row);
    }
    if constexpr (Traits::kStagesDense) {
      load_tile<typename Traits::StagedDense>(
          s_addr + Traits::kOffsetDense + stage * Traits::kBytesDense, block,
          params.dense + batch_idx * params.dense_stride_batch, params.dense_stride_head,
          params.dense_stride_row);
    }
  }

 private:
  template <class Staged, class T>
  __device__ __forceinline__ void load_tile(uint32_t s_tile_addr, int block, const T* g_matrix,
                                            int64_t head_stride, int64_t row_stride) const {
    Staged::template load<typename Traits::Threads>(
        s_tile_addr, work.len_kv(),
        [&](int row) {
          const int own = min_of(work.first_row() + row, work.rows.num_rows - 1);
          const int position = work.rows.position(own);
          return g_matrix + (work.tile.head_idx + work.rows.head(own, position)) * head_stride +
                 matrix_row<Spec>(work.sequence, position) * row_stride;
        },
        [&](int column) {
          if constexpr (kHasBlockLists<Spec>) {
            const uint32_t s_listed = gathered.listed_addr(block);
            return load_listed<Spec>(s_listed, column / 16).first_key + column % 16;
          }
          return block * Spec::kBlockKv + column;
        });
  }
};

}  // namespace jitattn

// Location of a row of K or V: in the sequence's own batch row, in a named batch row, in a flat
// tensor of all sequences, or in a page.
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Whether sequences may share rows of K and V, whose gradients then have several writers.
template <class Spec>
__device__ __forceinline__ bool shares_rows(const FwdParamsOf<Spec>& params) {
  if constexpr (kIsPaged<Spec>) return true;
  if constexpr (kMayNameRows<Spec>) return params.block_table != nullptr;
  return false;
}

template <class Spec>
struct KeyRows {
  const FwdParamsOf<Spec>& params;
  const int kv_start;
  const int last_key;
  const int64_t batch_row;
  const int32_t* g_table;  // of this sequence; pages

  __device__ KeyRows(const FwdParamsOf<Spec>& params, const Sequence& sequence, int batch_idx)
      : params(params),
        kv_start(sequence.kv_start),
        last_key(max_of(0, sequence.len_kv - 1)),
        batch_row(kv_row<Spec>(params, batch_idx)),
        g_table(nullptr) {
    if constexpr (kIsPaged<Spec>) g_table = params.block_table + batch_idx * params.table_stride;
  }

  // Returns the element offset of a key's row; keys beyond the end use the last key's row.
  __device__ int64_t offset(int key, int64_t stride_batch, int64_t stride_row) const {
    if constexpr (kIsPaged<Spec>) {
      const int row = kv_start + min_of(key, last_key);
      const int idx = divide(row, params.page_div_mul, params.page_div_shift);
      const uint32_t page = load_index(g_table, idx, params.table_word);
      // A page index beyond the pages is replaced by 0: no other memory is read.
      const int64_t known = page < params.num_pages ? page : 0;
      return known * stride_batch + (row - idx * params.page_size) * stride_row;
    } else {
      return batch_row * stride_batch + static_cast<int64_t>(kv_start + key) * stride_row;
    }
  }
};

}  // namespace jitattn

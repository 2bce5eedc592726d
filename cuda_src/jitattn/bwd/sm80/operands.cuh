// Loads the operands of both backward kernels into shared memory: K and V of a key block; Q, dO and
// the row statistics of a query tile.
#pragma once

#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm80/fine_stride.cuh"
#include "jitattn/bwd/sm80/key_rows.cuh"
#include "jitattn/bwd/sm80/storage.cuh"
#include "jitattn/bwd/sm80/traits.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Copies K and V of a key block.
template <class Spec, class Traits>
struct KeyCopies {
  using Element = typename Traits::Element;

  const BwdParamsOf<Spec>& params;
  const typename Traits::CopyK copy_k;
  const typename Traits::CopyV copy_v;

  __device__ __forceinline__ explicit KeyCopies(const BwdParamsOf<Spec>& params)
      : params(params),
        copy_k(threadIdx.x, params.k_stride_row),
        copy_v(threadIdx.x, params.v_stride_row) {}

  __device__ __forceinline__ void zero_padding(const BwdStorage<Traits>& storage) const {
    copy_k.zero_padding(storage.k);
    copy_v.zero_padding(storage.v);
  }

  // Starts copying the num_keys keys of a block.
  __device__ __forceinline__ void load(const BwdStorage<Traits>& storage, const Sequence& sequence,
                                       const KeyRows<Spec>& key_rows, int kv_head_idx, int block,
                                       int num_keys) const {
    auto load_rows = [&](const auto& copy, uint32_t s_addr, const void* tensor, int64_t batch,
                         int64_t row, int64_t head) {
      const Element* g_head = static_cast<const Element*>(tensor) + kv_head_idx * head;
      if constexpr (kGathersKeys<Spec> || kIsPaged<Spec>) {
        const auto key_of = keys_of_block<Spec>(params, sequence, kv_head_idx, block);
        const char* g_lane = copy.lane(reinterpret_cast<const char*>(g_head));
        copy.template load_rows<true, false>(s_addr, g_lane, num_keys, [&](int skip) {
          return key_rows.offset(key_of(copy.row + skip), batch, row) *
                 static_cast<int64_t>(sizeof(Element));
        });
      } else {
        const Element* g_first = g_head + key_rows.offset(block * Spec::kBlockKv, batch, row);
        copy.load_tail(s_addr, copy.share(reinterpret_cast<const char*>(g_first)), num_keys);
      }
    };
    load_rows(copy_k, storage.k, params.k, params.k_stride_batch, params.k_stride_row,
              params.k_stride_head);
    load_rows(copy_v, storage.v, params.v, params.v_stride_batch, params.v_stride_row,
              params.v_stride_head);
  }
};

// Copies Q and dO of a query tile.
template <class Spec, class Traits>
struct QueryCopies {
  const typename Traits::CopyQ copy_q;
  const typename Traits::CopyDo copy_do;

  __device__ __forceinline__ explicit QueryCopies(const BwdParamsOf<Spec>& params)
      : copy_q(threadIdx.x, params.q_stride_row), copy_do(threadIdx.x, params.d_out_stride_row) {}

  __device__ __forceinline__ void zero_padding(const BwdStorage<Traits>& storage) const {
#pragma unroll
    for (int buffer = 0; buffer < Spec::kStages; ++buffer) {
      copy_q.zero_padding(storage.q(buffer));
      copy_do.zero_padding(storage.d_out(buffer));
    }
  }
};

// The query tiles of one head.
template <class Spec, class Traits>
struct QueryTiles {
  using Element = typename Traits::Element;

  const BwdParamsOf<Spec>& params;
  const Sequence& sequence;
  const QueryCopies<Spec, Traits>& copies;
  const int batch_idx;
  const int head_idx;
  const char* g_q;
  const char* g_do;
  int64_t first_stat;

  __device__ __forceinline__ QueryTiles(const BwdParamsOf<Spec>& params, const Sequence& sequence,
                                        const QueryCopies<Spec, Traits>& copies, int batch_idx,
                                        int head_idx)
      : params(params),
        sequence(sequence),
        copies(copies),
        batch_idx(batch_idx),
        head_idx(head_idx),
        g_q(head_of(params.q, params.q_stride_batch, params.q_stride_row, params.q_stride_head,
                    batch_idx, head_idx)),
        g_do(head_of(params.d_out, params.d_out_stride_batch, params.d_out_stride_row,
                     params.d_out_stride_head, batch_idx, head_idx)),
        first_stat(batch_idx * params.stat_stride_batch + head_idx * params.stat_stride_head +
                   sequence.q_start) {}

  __device__ void load_q(uint32_t s_addr, int tile) const {
    load(copies.copy_q, s_addr, g_q, params.q_stride_row, tile);
  }

  __device__ void load_d_out(uint32_t s_addr, int tile) const {
    load(copies.copy_do, s_addr, g_do, params.d_out_stride_row, tile);
  }

  // Returns statistic `stat` of a row: LSE, delta, or the sink factor. A row that does not exist
  // has an LSE of +inf, and weights of 0.
  __device__ __forceinline__ float load_stat(int stat, int row, bool is_wanted = true) const {
    const bool exists = is_wanted && row < sequence.len_q && row >= sequence.first_position;
    const float* g_stats = stat == 0 ? params.lse_log2 : params.delta;
    if (Traits::kHasSinks && stat == 2) g_stats = params.sink_rest;
    return exists ? __ldg(g_stats + first_stat + row) : stat == 0 ? infinity() : 0.f;
  }

 private:
  __device__ __forceinline__ const char* head_of(const void* tensor, int64_t batch, int64_t row,
                                                 int64_t head, int batch_idx, int head_idx) const {
    const int64_t skipped = batch_idx * batch + sequence.q_start * row + head_idx * head;
    return reinterpret_cast<const char*>(static_cast<const Element*>(tensor) + skipped);
  }

  template <class Copy>
  __device__ __forceinline__ void load(const Copy& copy, uint32_t s_addr, const char* g_first,
                                       int64_t row_stride, int tile) const {
    const int first_row = tile * Spec::kBlockQ;
    const int num_rows = sequence.len_q - first_row;
    if constexpr (kHasBlockLists<Spec>) {
      // The first rows of a tile may not exist.
      copy.template load_rows<true, false>(s_addr, copy.lane(g_first), num_rows, [&](int skip) {
        const int row = max_of(first_row + copy.row + skip, sequence.first_position);
        return row * row_stride * static_cast<int64_t>(sizeof(Element));
      });
    } else {
      const int64_t skipped = first_row * row_stride * static_cast<int64_t>(sizeof(Element));
      copy.load_tail(s_addr, copy.share(g_first + skipped), num_rows);
    }
  }
};

}  // namespace jitattn

// Copies the operands of a CTA to shared memory with TMA: K and V, and Q and dO of each step.
#pragma once

#include "jitattn/attention/sequence.cuh"
#include "jitattn/bwd/sm90/pipeline.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/bwd/sm90/work.cuh"
#include "jitattn/ptx/sm90/elected.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct BwdOperandCopies {
  using Traits = BwdSm90Traits<Spec>;
  using Work = BwdSm90Work<Spec>;

  const BwdTensorMaps& maps;
  const Work& work;
  const BwdBarriers<Spec> barriers;
  const uint32_t s_addr;

  // Index in a dimension of a map, which has no extent there if the stride is 0.
  __device__ static int index(int idx, int64_t stride) { return stride == 0 ? 0 : idx; }

  // ---- Called by all lanes of one warp.
  __device__ __forceinline__ void load_k() const {
    const auto& params = work.params;
    ptx::mbarrier_arrive_expect_elected(barriers.k_full(),
                                        Traits::kPagesQk * Traits::kBytesKeyPage);
    load_pages<Traits::kPagesQk, Traits::kBytesKeyPage>(
        s_addr, maps.k, barriers.k_full(), work.sequence.kv_start + work.first_key,
        index(work.own.kv_head, params.k_stride_head), key_batch(params.k_stride_batch));
  }
  // V comes with the first dO, by whose barrier.
  __device__ __forceinline__ void load_v() const {
    const auto& params = work.params;
    load_pages<Traits::kPagesV, Traits::kBytesKeyPage>(
        s_addr + Traits::kOffsetV, maps.v, barriers.d_out_full(0),
        work.sequence.kv_start + work.first_key, index(work.own.kv_head, params.v_stride_head),
        key_batch(params.v_stride_batch));
  }
  __device__ __forceinline__ void load_q(const QueryStep& step, int stage) const {
    const auto& params = work.params;
    ptx::mbarrier_arrive_expect_elected(barriers.q_full(stage), Traits::kBytesQ);
    load_pages<Traits::kPagesQk, Traits::kBytesQueryPage>(
        s_addr + Traits::kOffsetQ + stage * Traits::kBytesQ, maps.q, barriers.q_full(stage),
        first_row(step), index(work.first_head() + step.head, params.q_stride_head),
        index(work.own.batch, params.q_stride_batch));
  }
  __device__ __forceinline__ void load_d_out(const QueryStep& step, int stage,
                                             bool is_first) const {
    const auto& params = work.params;
    ptx::mbarrier_arrive_expect_elected(
        barriers.d_out_full(stage),
        Traits::kBytesDo + (is_first ? Traits::kPagesV * Traits::kBytesKeyPage : 0));
    load_pages<Traits::kPagesV, Traits::kBytesQueryPage>(
        s_addr + Traits::kOffsetDo + stage * Traits::kBytesDo, maps.d_out,
        barriers.d_out_full(stage), first_row(step),
        index(work.first_head() + step.head, params.d_out_stride_head),
        index(work.own.batch, params.d_out_stride_batch));
  }

 private:
  __device__ int first_row(const QueryStep& step) const {
    return work.sequence.q_start + step.tile * Spec::kBlockQ;
  }
  __device__ int key_batch(int64_t stride) const {
    return index(kv_row<Spec>(work.params, work.own.batch), stride);
  }

  template <int kPages, int kBytesPage>
  __device__ __forceinline__ static void load_pages(uint32_t s_tile, const ptx::TensorMap& map,
                                                    uint32_t s_full, int row, int head, int batch) {
#pragma unroll
    for (int page = 0; page < kPages; ++page) {
      ptx::tma_load_elected(s_tile + page * kBytesPage, map, s_full, page * kPageColumns, row, head,
                            batch);
    }
  }
};

}  // namespace jitattn

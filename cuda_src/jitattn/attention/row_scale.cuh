// The factor of a score before exp2: one constant, or, for scaled operands (INT8, fp16 parts), one
// factor per row and key block.
#pragma once

#include "jitattn/attention/cta_work.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec, int kRowTiles, bool kIsPerRow = kIsScaled<Spec>>
struct RowScale {
  float scale_log2;

  __device__ explicit RowScale(const FwdParamsOf<Spec>& params) : scale_log2(params.scale_log2) {}
  __device__ float operator()(int, int) const { return scale_log2; }
  template <class WarpRows>
  __device__ void load_rows(const CtaWork<Spec>&, const WarpRows&) {}
  __device__ void load_keys(const CtaWork<Spec>&, int) {}
  template <class Scores>
  __device__ void remove_initial_bias(const Scores&) {}
  // bare: the score minus the accumulator's initial bias. addend: an addend for scores with the
  // bias.
  __device__ float bare(float score) const { return score; }
  __device__ float addend(int, int, float addend) const { return addend; }
};

template <class Spec, int kRowTiles>
struct RowScale<Spec, kRowTiles, true> {
  static constexpr float kOffset = kIsQuantized<Spec> ? 12582912.f : 0.f;  // see mma/int8.cuh
  // Largest score unit, base 2, at which the product with kOffset still rounds within the error
  // that a weight may have.
  static constexpr float kCoarse = 0x1p-4f;
  static constexpr int kKeys = 64;  // keys that share a scale: prepare/quantize.cuh
  static_assert(kKeys % (Spec::kBlockKv / Spec::kWarpsKv) == 0, "a warp's keys share a scale");

  float of_row[kRowTiles][2];  // times scale_log2
  float coarse_keys;           // of_keys above which a unit is coarse
  float offset;                // initial bias of the scores of this block
  float of_keys;
  float of_values;  // scale of V of the same keys; 1 if V is not scaled

  __device__ explicit RowScale(const FwdParamsOf<Spec>&)
      : coarse_keys(0.f), offset(kOffset), of_keys(1.f), of_values(1.f) {}

  // Loads the scales of a warp's rows (tile/warp_rows.cuh).
  template <class WarpRows>
  __device__ void load_rows(const CtaWork<Spec>& work, const WarpRows& warp_rows) {
    const FwdParamsOf<Spec>& params = work.params;
    const RowMap& rows = work.rows;
    // The scale of the sequence's first query in the first head of the tile.
    const float* g_scale = params.q_scale + work.tile.batch_idx * params.q_scale_stride_batch +
                           work.tile.head_idx * params.q_scale_stride_head + work.sequence.q_start;
    float most = 0.f;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min_of(warp_rows(m, half), rows.num_rows - 1);
        const int position = rows.position(row);
        const int64_t head = rows.head(row, position);
        const float of_q = __ldg(g_scale + head * params.q_scale_stride_head + position);
        of_row[m][half] = of_q * params.scale_log2;
        // Keeps the product with the scale of the keys above 0 (prepare/quantize.cuh).
        if constexpr (kIsQuantized<Spec>) of_row[m][half] = fmaxf(of_row[m][half], 1e-20f);
        most = fmaxf(most, of_row[m][half]);
      }
    }
    coarse_keys = kCoarse / most;
  }

  // Subtracts the initial bias from the scores where units are coarse. Lanes of a row agree.
  template <int kKeyTiles>
  __device__ void remove_initial_bias(float (&r_s)[kRowTiles][kKeyTiles][4]) {
    if constexpr (!kIsQuantized<Spec>) return;
    const bool is_coarse = of_keys > coarse_keys;
    offset = is_coarse ? 0.f : kOffset;
    if (!is_coarse) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) r_s[m][n][i] -= kOffset;
      }
    }
  }

  // Loads the scale of a warp's keys of a block.
  __device__ void load_keys(const CtaWork<Spec>& work, int first_key) {
    const FwdParamsOf<Spec>& params = work.params;
    const int64_t kv_head =  // counted over all sequences
        work.k_batch_idx() * (params.heads_q / params.heads_per_kv) + work.kv_head_idx;
    const int64_t idx = kv_head * ceil_div(params.len_kv, kKeys) + first_key / kKeys;
    of_keys = __ldg(params.k_scale + idx);
    if constexpr (kSplitFp32<Spec>) of_values = __ldg(params.v_scale + idx);
  }

  __device__ float operator()(int m, int half) const {
    const float product = of_row[m][half] * of_keys;
    // Never 0, since 0 times a hidden score, -inf, is NaN.
    return kIsQuantized<Spec> ? product : fmaxf(product, 0x1p-100f);
  }
  __device__ float bare(float score) const { return kIsQuantized<Spec> ? score - offset : score; }
  __device__ float addend(int m, int half, float addend) const {
    if constexpr (!kIsQuantized<Spec>) return addend;
    return fmaf(-offset, (*this)(m, half), addend);
  }
};

}  // namespace jitattn

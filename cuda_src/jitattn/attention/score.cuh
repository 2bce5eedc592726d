// Score modifications: softcap, ALiBi, biases, and -inf for keys hidden by tensors. Scores are
// unscaled q k^T here: each addend is divided by the scale, by which the softmax multiplies it
// again. (Usually the addend initialises the accumulator, and q k^T is added to it.)
#pragma once

#include "jitattn/attention/block_lists.cuh"
#include "jitattn/attention/matrices.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
constexpr bool kAddsToScores =
    Spec::kBias != BiasKind::kNone || Spec::kRelativeBias == Switch::kOn ||
    Spec::kAlibi == Switch::kOn || Spec::kKeyPadding == Switch::kOn ||
    (Spec::kDense == Switch::kOn && Spec::kDenseStaged == Staging::kOff);

// r_s = cap tanh(scale r_s / cap) / scale. tanh y = 1 - 2 / (e^2y + 1), with an error of about
// 1e-7; the error of the hardware tanh is 2^-11.
template <class Spec, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void cap_scores(float (&r_s)[kRowTiles][kKeyTiles][4],
                                           const FwdScoreParams& params) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float e2y = ptx::exp2_approx(r_s[m][n][i] * params.softcap_in);
        const float tanh = 1.f - 2.f * ptx::rcp_approx(e2y + 1.f);
        r_s[m][n][i] = tanh * params.softcap_out;
      }
    }
  }
}

// Values below -3e7 hide a key, as -inf does. A maximum is rounded to fp32 and subtracted exactly:
// from 2^26 on, the rounding error alone would leave the range of fp16 weights.
template <class Spec>
__device__ __forceinline__ float bounded_bias(float bias) {
  if constexpr (Spec::kBias == BiasKind::kSame && Spec::kDtype == Dtype::kFp16) return bias;
  return bias < -3e7f ? -infinity() : bias;
}

// Biases and masks in memory for a warp's rows (tile/warp_rows.cuh) and keys. Rows and keys that do
// not exist are not read. s_bias: a staged bias at the first row and key of the warp.
template <class Spec, class WarpRows>
struct ScoreTerms {
  using Traits = MatrixTraits<Spec>;
  using Bias = typename Traits::Bias;
  using T = typename Bias::type;
  static constexpr bool kReadsBias = Spec::kBias != BiasKind::kNone && !Traits::kStagesBias;
  static constexpr bool kReadsDense = Spec::kDense == Switch::kOn && !Traits::kStagesDense;
  static constexpr bool kStagesRow = Spec::kBiasStaged == Staging::kRow;
  static constexpr bool kStagesMatrix = Spec::kBiasStaged == Staging::kMatrix;
  // Whether terms other than the bias differ from row to row; a bias may or may not.
  static constexpr bool kHasRows = Spec::kRelativeBias == Switch::kOn ||
                                   Spec::kAlibi == Switch::kOn || kReadsDense || kStagesMatrix;

  const FwdParamsOf<Spec>& params;
  const Sequence& sequence;
  const RowMap& rows;
  const int batch_idx, first_head;
  const WarpRows& warp_rows;
  const KeyColumns<Spec>& columns;
  const uint32_t s_bias;

  // Adds the terms common to all rows: a column is read once.
  template <int kRowTiles, int kKeyTiles>
  __device__ void add_columns(float (&r_s)[kRowTiles][kKeyTiles][4]) const {
    if constexpr (kReadsBias || kStagesRow || Spec::kKeyPadding == Switch::kOn) {
      const bool adds_bias = kReadsBias && params.bias_is_shared;
      if (Spec::kKeyPadding != Switch::kOn && !kStagesRow && !adds_bias) return;
      const T* g_row = static_cast<const T*>(params.bias) + batch_idx * params.bias_stride_batch +
                       first_head * params.bias_stride_head;
      const uint8_t* g_padding = params.key_padding + batch_idx * params.key_padding_stride;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const int key = columns(n);
        float pair[2] = {0.f, 0.f};
        if (adds_bias) load_bias(pair, g_row, key);
        if constexpr (kStagesRow) load_staged(pair, 0, n);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          pair[i] *= params.inverse_scale;
          if constexpr (Spec::kKeyPadding == Switch::kOn) {
            const bool keeps = key + i < sequence.len_kv && __ldg(g_padding + key + i) != 0;
            pair[i] = keeps ? pair[i] : -infinity();
          }
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) r_s[m][n][i] += pair[i % 2];
        }
      }
    }
  }

  // Adds the terms that differ from row to row.
  template <int kRowTiles, int kKeyTiles>
  __device__ void add_rows(float (&r_s)[kRowTiles][kKeyTiles][4]) const {
    if (!kHasRows && (!kReadsBias || params.bias_is_shared)) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min_of(warp_rows(m, half), rows.num_rows - 1);
        const int position = rows.position(row);
        const RowTerms terms = terms_of(position, first_head + rows.head(row, position));
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          float pair[2] = {0.f, 0.f};
          const int key = columns(n);
          if constexpr (kReadsBias) {
            if (!params.bias_is_shared) load_bias(pair, terms.g_bias, key);
          }
          if constexpr (kStagesMatrix) load_staged(pair, warp_rows.offset(m, half), n);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            add_of_distance(pair[i], terms, key + i);
            pair[i] *= params.inverse_scale;
            if constexpr (kReadsDense) {
              const bool stays = key + i < sequence.len_kv && __ldg(terms.g_dense + key + i) != 0;
              pair[i] = stays ? pair[i] : -infinity();
            }
            r_s[m][n][2 * half + i] += pair[i];
          }
        }
      }
    }
  }

 private:
  // The addresses of the terms of one row.
  struct RowTerms {
    int own_key;  // key at distance 0
    const T* g_bias;
    const uint8_t* g_dense;
    float slope;
    const float* g_relative;
  };

  __device__ RowTerms terms_of(int position, int64_t head) const {
    RowTerms terms = {position + sequence.len_kv - sequence.len_q};
    if constexpr (kReadsBias) {
      terms.g_bias = static_cast<const T*>(params.bias) + batch_idx * params.bias_stride_batch +
                     head * params.bias_stride_head +
                     matrix_row<Spec>(sequence, position) * params.bias_stride_row;
    }
    if constexpr (kReadsDense) {
      terms.g_dense = params.dense + batch_idx * params.dense_stride_batch +
                      head * params.dense_stride_head +
                      matrix_row<Spec>(sequence, position) * params.dense_stride_row;
    }
    if constexpr (Spec::kAlibi == Switch::kOn) {
      terms.slope = __ldg(params.alibi_slopes + batch_idx * params.alibi_stride_batch + head);
    }
    if constexpr (Spec::kRelativeBias == Switch::kOn) {
      terms.g_relative = params.relative_bias + head * params.relative_stride_head;
    }
    return terms;
  }

  // Adds ALiBi and the relative bias, functions of the distance from the row's own key.
  __device__ void add_of_distance(float& term, const RowTerms& terms, int key) const {
    const int distance = key - terms.own_key;
    if constexpr (Spec::kAlibi == Switch::kOn) {
      term -= terms.slope * static_cast<float>(distance < 0 ? -distance : distance);
    }
    if constexpr (Spec::kRelativeBias == Switch::kOn) {
      const int reach = params.relative_reach;
      term += __ldg(terms.g_relative + reach + max_of(-reach, min_of(reach, distance)));
    }
  }

  __device__ void load_staged(float (&pair)[2], int row_in_warp, int n) const {
    const int column = n * 8 + accumulator_column(warp_rows.lane_idx);
    Bias::load_pair_shared(pair, s_bias + row_in_warp * Traits::StagedBias::kPitch +
                                     column * static_cast<int>(sizeof(T)));
    pair[0] = bounded_bias<Spec>(pair[0]);
    pair[1] = bounded_bias<Spec>(pair[1]);
  }

  __device__ void load_bias(float (&pair)[2], const T* g_row, int key) const {
    if (params.bias_is_paired && key + 1 < sequence.len_kv) {
      Bias::load_pair(pair, g_row + key);
    } else {
      if (key < sequence.len_kv) pair[0] = Bias::load(__ldg(g_row + key));
      if (key + 1 < sequence.len_kv) pair[1] = Bias::load(__ldg(g_row + key + 1));
    }
    pair[0] = bounded_bias<Spec>(pair[0]);
    pair[1] = bounded_bias<Spec>(pair[1]);
  }
};

// r_s += (biases) / scale, and -inf for keys that tensors hide.
template <class Spec, class WarpRows, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void add_to_scores(float (&r_s)[kRowTiles][kKeyTiles][4],
                                              const FwdParamsOf<Spec>& params,
                                              const Sequence& sequence, const RowMap& rows,
                                              int batch_idx, int first_head,
                                              const WarpRows& warp_rows,
                                              const KeyColumns<Spec>& columns, uint32_t s_bias) {
  const ScoreTerms<Spec, WarpRows> terms = {params,     sequence,  rows,    batch_idx,
                                            first_head, warp_rows, columns, s_bias};
  terms.add_columns(r_s);
  terms.add_rows(r_s);
}

// Applies a staged mask. s_dense: its tile at the first row and key of the warp.
template <class Spec, class WarpRows, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void hide_staged(float (&r_s)[kRowTiles][kKeyTiles][4],
                                            const WarpRows& warp_rows, uint32_t s_dense) {
  using Dense = typename MatrixTraits<Spec>::StagedDense;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t s_row = s_dense + warp_rows.offset(m, half) * Dense::kPitch;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const uint32_t s_pair = s_row + n * 8 + accumulator_column(warp_rows.lane_idx);
        const uint32_t keeps = ptx::ld_shared_b32(s_pair & ~3u) >> (s_pair & 2u) * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = r_s[m][n][2 * half + i];
          score = (keeps >> 8 * i & 0xffu) != 0 ? score : -infinity();
        }
      }
    }
  }
}

// Returns the term of a sink in the row sum of exp2(score - max); -max is given.
template <class Spec>
__device__ __forceinline__ float sink_weight(const FwdParamsOf<Spec>& params, int head_idx,
                                             float neg_max_log2) {
  if constexpr (Spec::kSinks == Switch::kOn) {
    constexpr float kLog2e = 1.4426950408889634f;
    return ptx::exp2_approx(fmaf(__ldg(params.sinks + head_idx), kLog2e, neg_max_log2));
  }
  return 0.f;
}

}  // namespace jitattn

// What is added to scores and done with them: softcap, ALiBi, biases. Scores are q k^T here, not
// scaled yet: whatever is added is divided by the scale, by which the softmax multiplies it again.
#pragma once

#include "jitattn/element.cuh"
#include "jitattn/enums.cuh"
#include "jitattn/key_lists.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/rows.cuh"
#include "jitattn/schedule.cuh"
#include "jitattn/sequence.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <class Spec>
constexpr bool kAddsToScores = Spec::kBias != BiasKind::kNone ||
                               Spec::kRelativeBias == Switch::kOn || Spec::kAlibi == Switch::kOn;

// r_s = cap tanh(scale r_s / cap) / scale. tanh y = 1 - 2 / (e^2y + 1), to some 1e-7; the
// hardware's own tanh is 2^-11.
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

// r_s += (biases) / scale, for rows first_row .. and keys first_key .. of this warp. Nothing is
// read for rows and keys that do not exist.
template <class Spec, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void add_to_scores(float (&r_s)[kRowTiles][kKeyTiles][4],
                                              const FwdScoreParams& params,
                                              const Sequence& sequence, const RowMap& rows,
                                              int batch_idx, int first_head, int first_row,
                                              const KeyColumns<Spec>& columns, int lane_idx) {
  using Bias = Scalar<Spec::kBias == BiasKind::kFp32 ? Dtype::kFp32 : Spec::kDtype>;
  using T = typename Bias::type;
  auto load_bias = [&](float (&pair)[2], const T* g_row, int key) {
    if (params.bias_is_paired && key + 1 < sequence.len_kv) {
      Bias::load_pair(pair, g_row + key);
    } else {
      if (key < sequence.len_kv) pair[0] = Bias::load(__ldg(g_row + key));
      if (key + 1 < sequence.len_kv) pair[1] = Bias::load(__ldg(g_row + key + 1));
    }
    if constexpr (Spec::kBias == BiasKind::kFp32 || Spec::kDtype != Dtype::kFp16) {
      // As low as a maximum can be, of what is finite: a row of nothing else gets their mean.
      constexpr float kLowest = -3e29f, kLeast = -3.402823466e38f;
#pragma unroll
      for (int i = 0; i < 2; ++i) pair[i] = pair[i] < kLeast ? pair[i] : fmaxf(pair[i], kLowest);
    }
  };
  if constexpr (Spec::kBias != BiasKind::kNone) {
    if (params.bias_is_shared) {  // one row for all: a column is read once
      const T* g_row = static_cast<const T*>(params.bias) + batch_idx * params.bias_stride_batch +
                       first_head * params.bias_stride_head;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        float pair[2] = {0.f, 0.f};
        load_bias(pair, g_row, columns(n));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) r_s[m][n][i] += pair[i % 2] * params.inverse_scale;
        }
      }
    }
    constexpr bool kIsAlone = Spec::kRelativeBias == Switch::kOff && Spec::kAlibi == Switch::kOff;
    if (kIsAlone && params.bias_is_shared) return;
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row =
          min_of(first_row + m * 16 + accumulator_row(lane_idx, half), rows.num_rows - 1);
      const int position = rows.position(row);
      const int64_t head = first_head + rows.head(row, position);
      const int own_key = position + sequence.len_kv - sequence.len_q;

      const T* g_bias = nullptr;
      if constexpr (Spec::kBias != BiasKind::kNone) {
        g_bias = static_cast<const T*>(params.bias) + batch_idx * params.bias_stride_batch +
                 head * params.bias_stride_head +
                 matrix_row<Spec>(sequence, position) * params.bias_stride_row;
      }
      float slope = 0.f;
      if constexpr (Spec::kAlibi == Switch::kOn) {
        slope = __ldg(params.alibi_slopes + batch_idx * params.alibi_stride_batch + head);
      }
      const float* g_relative = nullptr;
      if constexpr (Spec::kRelativeBias == Switch::kOn) {
        g_relative = params.relative_bias + head * params.relative_stride_head;
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        float pair[2] = {0.f, 0.f};
        const int key = columns(n);
        if constexpr (Spec::kBias != BiasKind::kNone) {
          if (!params.bias_is_shared) load_bias(pair, g_bias, key);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int distance = key + i - own_key;
          if constexpr (Spec::kAlibi == Switch::kOn) {
            pair[i] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
          }
          if constexpr (Spec::kRelativeBias == Switch::kOn) {
            const int reach = params.relative_reach;
            pair[i] += __ldg(g_relative + reach + max_of(-reach, min_of(reach, distance)));
          }
          r_s[m][n][2 * half + i] += pair[i] * params.inverse_scale;
        }
      }
    }
  }
}

// What a sink adds to the sum of a row whose scores are exp2(score - max), with -max given.
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

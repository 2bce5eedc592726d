// What        Scales vectors, or equal slices (groups) of them, to length 1: cosine attention.
//
// Math        y = scale_h x / |x|, |x| in fp32; 0 for a vector shorter than 1e-12.
//
// Work split  kLanes neighbouring lanes a slice; q first, then k, in one launch.
#pragma once

#include "jitattn/element.cuh"
#include "jitattn/enums.cuh"
#include "jitattn/params.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void l2norm(const NormParams& params) {
  static_assert(sizeof(NormParams) == Spec::kParamsBytes, "host and device disagree on NormParams");
  static_assert(Spec::kSmemBytes == 0, "the norm kernel uses no shared memory");
  using Element = Scalar<Spec::kDtype>;
  using T = typename Element::type;
  constexpr int kSlice = Spec::kHeadDim / Spec::kGroups;
  // Elements of one access.
  constexpr int kWide = 16 / sizeof(T);
  constexpr int kVec = Spec::kAccess == Access::kVec16 && kSlice % kWide == 0 ? kWide : 1;
  constexpr int kChunks = kSlice / kVec;
  constexpr int kLanes = Spec::kLanes;
  constexpr int kPerLane = ceil_div(kChunks, kLanes);

  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
  int64_t slice = thread / kLanes;
  const int lane = static_cast<int>(thread % kLanes);
  const bool is_k = slice >= params.num_slices_q;
  if (is_k) slice -= params.num_slices_q;
  const bool exists = slice < (is_k ? params.num_slices_k : params.num_slices_q);
  const int heads = is_k ? params.heads_k : params.heads_q;
  const int len = is_k ? params.len_k : params.len_q;
  const int64_t group = slice % Spec::kGroups, vector = slice / Spec::kGroups;
  const int64_t head = vector % heads, row = vector / heads % len, batch = vector / heads / len;
  const int64_t from = batch * (is_k ? params.k_stride_batch : params.q_stride_batch) +
                       row * (is_k ? params.k_stride_row : params.q_stride_row) +
                       head * (is_k ? params.k_stride_head : params.q_stride_head) + group * kSlice;
  const T* g_in = static_cast<const T*>(is_k ? params.k : params.q) + from;
  T* g_out = static_cast<T*>(is_k ? params.k_out : params.q_out) + slice * kSlice;

  float x[kPerLane][kVec];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int chunk = i * kLanes + lane;
    const bool is_mine = exists && chunk < kChunks;
    if constexpr (kVec > 1) {
      union {
        Vec16 vec;
        T element[kVec];
      } loaded = {};
      if (is_mine) loaded.vec = *reinterpret_cast<const Vec16*>(g_in + chunk * kVec);
#pragma unroll
      for (int j = 0; j < kVec; ++j) x[i][j] = Element::load(loaded.element[j]);
    } else {
      x[i][0] = is_mine ? Element::load(g_in[chunk]) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum = fmaf(x[i][j], x[i][j], sum);
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  }
  if (!exists) return;
  float factor = sum < 1e-24f ? 0.f : 1.f / sqrtf(sum);
  if (!is_k && params.head_scale != nullptr) {
    factor *=
        __ldg(params.head_scale + row * params.scale_stride_row + head * params.scale_stride_head);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int chunk = i * kLanes + lane;
    if (chunk >= kChunks) continue;
    if constexpr (kVec > 1) {
      union {
        Vec16 vec;
        T element[kVec];
      } stored;
#pragma unroll
      for (int j = 0; j < kVec; ++j) stored.element[j] = Element::round(x[i][j] * factor);
      *reinterpret_cast<Vec16*>(g_out + chunk * kVec) = stored.vec;
    } else {
      g_out[chunk] = Element::round(x[i][0] * factor);
    }
  }
}

}  // namespace jitattn

// What        Scales vectors, or equal slices (groups) of them, to length 1: cosine attention; and
//             the gradient of that.
//
// Math        y = scale_h x / |x|, |x| in fp32; 0 for a vector shorter than 1e-12.
//             dx = scale_h (dy - u (u dy)) / |x| with u = x / |x|; dscale_h = sum of u dy
//
// Work split  kLanes neighbouring lanes a slice; q first, then k, in one launch. The gradients of q
//             and of k are a launch each.
#pragma once

#include "jitattn/element.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// One lane's part of a slice, in fp32.
template <class Spec>
struct Slice {
  using Element = Scalar<Spec::kDtype>;
  using T = typename Element::type;
  static constexpr int kSize = Spec::kHeadDim / Spec::kGroups;
  // Elements of one access.
  static constexpr int kWide = 16 / sizeof(T);
  static constexpr int kVec = Spec::kAccess == Access::kVec16 && kSize % kWide == 0 ? kWide : 1;
  static constexpr int kChunks = kSize / kVec;
  static constexpr int kLanes = Spec::kLanes;
  static constexpr int kPerLane = ceil_div(kChunks, kLanes);

  float x[kPerLane][kVec];

  // Zeros where there is nothing.
  __device__ void load(const T* g_in, int lane, bool exists) {
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
    }
  }

  __device__ void store(T* g_out, int lane) const {
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
        for (int j = 0; j < kVec; ++j) stored.element[j] = Element::round(x[i][j]);
        *reinterpret_cast<Vec16*>(g_out + chunk * kVec) = stored.vec;
      } else {
        g_out[chunk] = Element::round(x[i][0]);
      }
    }
  }

  // Of all lanes of the slice; every lane of the warp comes here.
  __device__ float dot(const Slice& other) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum = fmaf(x[i][j], other.x[i][j], sum);
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    }
    return sum;
  }

  // x = factor x + other_factor other
  __device__ void combine(float factor, float other_factor, const Slice& other) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        x[i][j] = fmaf(other_factor, other.x[i][j], factor * x[i][j]);
      }
    }
  }
};

// 1 / |x| of a vector whose square is given; 0 if it is too short to have a direction.
__device__ __forceinline__ float inverse_length(float square) {
  return square < 1e-24f ? 0.f : 1.f / sqrtf(square);
}

template <class Spec>
__device__ __forceinline__ void l2norm(const NormParams& params) {
  static_assert(sizeof(NormParams) == Spec::kParamsBytes, "host and device disagree on NormParams");
  static_assert(Spec::kSmemBytes == 0, "the norm kernel uses no shared memory");
  using Slice = jitattn::Slice<Spec>;
  using T = typename Slice::T;
  constexpr int kSlice = Slice::kSize, kLanes = Slice::kLanes;

  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
  int64_t slice = thread / kLanes;
  const int lane = static_cast<int>(thread % kLanes);
  const bool is_k = slice >= params.num_slices_q;
  if (is_k) slice -= params.num_slices_q;
  const bool exists = slice < (is_k ? params.num_slices_k : params.num_slices_q);
  const int heads = is_k ? params.heads_k : params.heads_q;
  const int len = max_of(1, is_k ? params.len_k : params.len_q);  // without keys: of no slice
  const int64_t group = slice % Spec::kGroups, vector = slice / Spec::kGroups;
  const Division by_head = divide(vector, heads), by_row = divide(by_head.quotient, len);
  const int64_t batch = by_row.quotient, row = by_row.rest, head = by_head.rest;
  const int64_t from = batch * (is_k ? params.k_stride_batch : params.q_stride_batch) +
                       row * (is_k ? params.k_stride_row : params.q_stride_row) +
                       head * (is_k ? params.k_stride_head : params.q_stride_head) + group * kSlice;

  Slice x;
  x.load(static_cast<const T*>(is_k ? params.k : params.q) + from, lane, exists);
  float factor = inverse_length(x.dot(x));
  if (!exists) return;
  if (!is_k && params.head_scale != nullptr) {
    factor *=
        __ldg(params.head_scale + row * params.scale_stride_row + head * params.scale_stride_head);
  }
  x.combine(factor, 0.f, x);
  x.store(static_cast<T*>(is_k ? params.k_out : params.q_out) + slice * kSlice, lane);
}

template <class Spec>
__device__ __forceinline__ void l2norm_grad(const NormGradParams& params) {
  static_assert(sizeof(NormGradParams) == Spec::kParamsBytes,
                "host and device disagree on NormGradParams");
  using Slice = jitattn::Slice<Spec>;
  using T = typename Slice::T;
  constexpr int kSlice = Slice::kSize, kLanes = Slice::kLanes;

  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
  const int64_t slice = thread / kLanes;
  const int lane = static_cast<int>(thread % kLanes);
  const bool exists = slice < params.num_slices;
  const int64_t group = slice % Spec::kGroups, vector = slice / Spec::kGroups;
  const Division by_head = divide(vector, params.heads);
  const Division by_row = divide(by_head.quotient, params.len);
  const int64_t batch = by_row.quotient, row = by_row.rest, head = by_head.rest;
  Slice x, d_y;
  x.load(static_cast<const T*>(params.x) + batch * params.x_stride_batch +
             row * params.x_stride_row + head * params.x_stride_head + group * kSlice,
         lane, exists);
  d_y.load(static_cast<const T*>(params.d_y) + slice * kSlice, lane, exists);
  const float inverse = inverse_length(x.dot(x));
  const float along = inverse * x.dot(d_y);  // u dy
  if (!exists) return;
  float scale = 1.f;
  if (params.head_scale != nullptr) {
    scale =
        __ldg(params.head_scale + row * params.scale_stride_row + head * params.scale_stride_head);
  }
  if (params.d_scale != nullptr && lane == 0) params.d_scale[slice] = along;
  d_y.combine(scale * inverse, -scale * inverse * inverse * along, x);
  d_y.store(static_cast<T*>(params.dx) + slice * kSlice, lane);
}

}  // namespace jitattn

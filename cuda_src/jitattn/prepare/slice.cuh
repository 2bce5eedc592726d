// Slices of vectors, shared by a few neighbouring lanes, for normalisation.
#pragma once

#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// One lane's part of a slice, in fp32.
template <class Spec>
struct Slice {
  using Element = Scalar<Spec::kDtype>;
  using T = typename Element::type;
  static constexpr int kSize = Spec::kHeadDim / Spec::kGroups;
  // Elements per access.
  static constexpr int kWide = 16 / sizeof(T);
  static constexpr int kVec = Spec::kAccess == Access::kVec16 && kSize % kWide == 0 ? kWide : 1;
  static constexpr int kChunks = kSize / kVec;
  static constexpr int kLanes = Spec::kLanes;
  static constexpr int kPerLane = ceil_div(kChunks, kLanes);

  float x[kPerLane][kVec];

  // Loads the slice; zeros if it does not exist.
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

  // Dot product over all lanes of the slice. Called by every lane of the warp.
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

// Returns 1 / |x| for a vector with the given square; 0 if it is too short to have a direction.
__device__ __forceinline__ float inverse_length(float square) {
  return square < 1e-24f ? 0.f : 1.f / sqrtf(square);
}

}  // namespace jitattn

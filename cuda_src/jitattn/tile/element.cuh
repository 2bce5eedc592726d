// Scalar access to a tensor: its storage type, and conversion to and from fp32.
#pragma once

#include "jitattn/ptx/math.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <Dtype kDtype>
struct Scalar {
  using type = uint16_t;
  __device__ static float load(uint16_t bits) {
    if constexpr (kDtype == Dtype::kBf16) return __int_as_float(static_cast<uint32_t>(bits) << 16);
    return ptx::f16_to_f32(bits);
  }
  // Loads two neighbours, the first at an even index.
  __device__ static void load_pair(float (&pair)[2], const uint16_t* g_pair) {
    const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(g_pair));
    pair[0] = load(static_cast<uint16_t>(bits));
    pair[1] = load(static_cast<uint16_t>(bits >> 16));
  }
  __device__ static void load_pair_shared(float (&pair)[2], uint32_t s_pair) {
    const uint32_t bits = ptx::ld_shared_b32(s_pair);
    pair[0] = load(static_cast<uint16_t>(bits));
    pair[1] = load(static_cast<uint16_t>(bits >> 16));
  }
  __device__ static uint16_t round(float value) {
    if constexpr (kDtype == Dtype::kBf16) {
      return static_cast<uint16_t>(ptx::pack_bf16x2(value, 0.f));
    }
    return static_cast<uint16_t>(ptx::pack_f16x2(value, 0.f));
  }
  // Rounds two neighbours.
  __device__ static uint32_t round_pair(float left, float right) {
    if constexpr (kDtype == Dtype::kBf16) return ptx::pack_bf16x2(left, right);
    return ptx::pack_f16x2(left, right);
  }
};
template <>
struct Scalar<Dtype::kFp32> {
  using type = float;
  __device__ static float load(float value) { return value; }
  __device__ static void load_pair(float (&pair)[2], const float* g_pair) {
    const float2 both = __ldg(reinterpret_cast<const float2*>(g_pair));
    pair[0] = both.x;
    pair[1] = both.y;
  }
  __device__ static void load_pair_shared(float (&pair)[2], uint32_t s_pair) {
    const int64_t bits = ptx::ld_shared_b64(s_pair);
    pair[0] = __int_as_float(static_cast<int>(bits));
    pair[1] = __int_as_float(static_cast<int>(bits >> 32));
  }
  __device__ static float round(float value) { return value; }
};

}  // namespace jitattn

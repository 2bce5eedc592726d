// One element of a tensor, outside of tiles: its storage type, and fp32 to and fro.
#pragma once

#include "jitattn/enums.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <Dtype kDtype>
struct Scalar {
  using type = uint16_t;
  __device__ static float load(uint16_t bits) {
    if constexpr (kDtype == Dtype::kBf16) return __int_as_float(static_cast<uint32_t>(bits) << 16);
    return ptx::f16_to_f32(bits);
  }
  __device__ static uint16_t round(float value) {
    if constexpr (kDtype == Dtype::kBf16) {
      return static_cast<uint16_t>(ptx::pack_bf16x2(value, 0.f));
    }
    return static_cast<uint16_t>(ptx::pack_f16x2(value, 0.f));
  }
};
template <>
struct Scalar<Dtype::kFp32> {
  using type = float;
  __device__ static float load(float value) { return value; }
  __device__ static float round(float value) { return value; }
};

}  // namespace jitattn

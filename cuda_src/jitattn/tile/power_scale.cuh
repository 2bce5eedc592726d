// Powers of two that bring numbers into the range of fp16, and what undoes them.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

// Rows of a head that share a scale.
constexpr int kRowsPerScale = 64;

// Brings numbers up to `most` to 2^13 … 2^14.
struct PowerScale {
  float up;
  float down;

  __device__ explicit PowerScale(float most) {
    const int exponent = max_of(-100, static_cast<int>(__float_as_uint(most) >> 23) - 127);
    up = __int_as_float((13 - exponent + 127) << 23);
    down = __int_as_float((exponent - 13 + 127) << 23);
  }
};

}  // namespace jitattn

// Power-of-two scales that bring values into the range of fp16, and their inverses.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

// Rows of a head that share a scale.
constexpr int kRowsPerScale = 64;

// Scales a maximum of `most` into [2^13, 2^14), and holds the inverse.
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

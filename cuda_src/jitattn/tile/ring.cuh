// Position in a ring of buffers, with the parity of the barrier phase that is waited for.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

template <int kStages>
struct Ring {
  int stage;
  uint32_t parity;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace jitattn

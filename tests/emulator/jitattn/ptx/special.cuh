#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

inline uint32_t cta_idx() { return blockIdx.x; }
inline uint32_t thread_idx() { return static_cast<int>(threadIdx.x); }

}  // namespace jitattn::ptx

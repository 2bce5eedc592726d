#include "jitattn/kvcache/rotary.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_rotary(const __grid_constant__ jitattn::RotaryParams params) {
  jitattn::rotary<Spec>(params);
}

#include "jitattn/kvcache/append.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads, 1)
    jitattn_append(const __grid_constant__ jitattn::AppendParams params) {
  jitattn::append<Spec>(params);
}

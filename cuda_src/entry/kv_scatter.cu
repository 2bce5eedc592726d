#include "jitattn/bwd/kv_scatter.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_kv_scatter(const __grid_constant__ jitattn::ScatterParams params) {
  jitattn::kv_scatter<Spec>(params);
}

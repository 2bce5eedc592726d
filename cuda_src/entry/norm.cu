#include "jitattn/prepare/l2norm.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_norm(const __grid_constant__ jitattn::NormParams params) {
  jitattn::l2norm<Spec>(params);
}

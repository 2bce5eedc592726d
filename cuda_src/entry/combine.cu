#include "jitattn/combine/combine.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_combine(const __grid_constant__ jitattn::CombineParams params) {
  jitattn::combine<Spec>(params);
}

#include "jitattn/bwd/sum_parts.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_sum_parts(const __grid_constant__ jitattn::SumPartsParams params) {
  jitattn::sum_parts<Spec>(params);
}

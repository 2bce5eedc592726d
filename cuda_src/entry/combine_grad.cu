#include "jitattn/combine/combine_grad.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_combine_grad(const __grid_constant__ jitattn::CombineGradParams params) {
  jitattn::combine_grad<Spec>(params);
}

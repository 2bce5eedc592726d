#include "jitattn/prepare/l2norm_grad.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_norm_grad(const __grid_constant__ jitattn::NormGradParams params) {
  jitattn::l2norm_grad<Spec>(params);
}

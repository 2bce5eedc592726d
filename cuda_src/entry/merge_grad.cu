#include "jitattn/combine/merge_grad.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_merge_grad(const __grid_constant__ jitattn::MergeGradParams params) {
  jitattn::merge_grad<Spec>(params);
}

#include "jitattn/combine/merge.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_merge(const __grid_constant__ jitattn::MergeParams params) {
  jitattn::merge_parts<Spec>(params);
}

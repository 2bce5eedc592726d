#include "jitattn/prepare/split_halves.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_split_halves(const __grid_constant__ jitattn::SplitParams params) {
  jitattn::split_halves<Spec>(params);
}

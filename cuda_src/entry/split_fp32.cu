#include "jitattn/prepare/split_fp32.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_split_fp32(const __grid_constant__ jitattn::SplitFp32Params params) {
  jitattn::split_fp32<Spec>(params);
}

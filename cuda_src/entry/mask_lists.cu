#include "jitattn/prepare/mask_lists.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads) jitattn_mask_lists(
    const __grid_constant__ jitattn::FunctionParams<jitattn::MaskListsParams> params) {
  jitattn::mask_lists<Spec>(params);
}

#include "jitattn/fwd/sm90/kernel.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads, 1)
    jitattn_fwd_sm90(const __grid_constant__ jitattn::FwdTensorMaps maps,
                     const __grid_constant__ jitattn::FwdSm90Traits<Spec>::Params params) {
  jitattn::attn_fwd_sm90<Spec>(maps, params);
}

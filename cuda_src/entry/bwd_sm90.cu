#include "jitattn/bwd/sm90/kernel.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads, 1)
    jitattn_bwd_sm90(const __grid_constant__ jitattn::BwdTensorMaps maps,
                     const __grid_constant__ jitattn::BwdSm90Traits<Spec>::Params params) {
  jitattn::attn_bwd_sm90<Spec>(maps, params);
}

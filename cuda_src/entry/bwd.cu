#include "jitattn/bwd/sm80/kernel.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(jitattn::BwdTraits<Spec>::kNumThreads,
                                             Spec::kMinBlocksPerSm)
    jitattn_bwd(const __grid_constant__ jitattn::BwdParamsOf<Spec> params) {
  jitattn::attn_bwd<Spec>(params);
}

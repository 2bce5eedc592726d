#include "jitattn/bwd/sm80/captured.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(jitattn::BwdTraits<Spec>::kNumThreads,
                                             Spec::kMinBlocksPerSm)
    jitattn_bwd_captured(const __grid_constant__ jitattn::BwdParamsOf<Spec> params) {
  jitattn::attn_bwd_captured<Spec>(params);
}

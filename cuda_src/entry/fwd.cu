#include "jitattn/fwd/sm80/kernel.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(jitattn::FwdTraits<Spec>::kNumThreads,
                                             Spec::kMinBlocksPerSm)
    jitattn_fwd(const __grid_constant__ jitattn::FwdParamsOf<Spec> params) {
  jitattn::attn_fwd<Spec>(params);
}

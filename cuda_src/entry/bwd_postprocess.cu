#include "jitattn/bwd/postprocess.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_bwd_postprocess(const __grid_constant__ jitattn::BwdPostprocessParams params) {
  jitattn::bwd_postprocess<Spec>(params);
}

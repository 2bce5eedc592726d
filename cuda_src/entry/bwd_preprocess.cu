#include "jitattn/bwd/preprocess.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_bwd_preprocess(const __grid_constant__ jitattn::BwdPreprocessParams params) {
  jitattn::bwd_preprocess<Spec>(params);
}

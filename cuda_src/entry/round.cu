#include "jitattn/bwd/dq_round.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_round(const __grid_constant__ jitattn::RoundParams params) {
  jitattn::dq_round<Spec>(params);
}

#include "jitattn/bwd/row_stats.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_stats(const __grid_constant__ jitattn::StatsParams params) {
  jitattn::row_stats<Spec>(params);
}

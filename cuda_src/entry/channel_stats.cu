#include "jitattn/prepare/channel_stats.cuh"
#include "jitattn_spec.h"

extern "C" __global__ void __launch_bounds__(Spec::kNumThreads)
    jitattn_channel_stats(const __grid_constant__ jitattn::QuantParams params) {
  jitattn::channel_stats<Spec>(params);
}

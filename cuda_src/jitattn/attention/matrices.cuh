// Types of biases and dense masks: their elements, and their tiles if staged through shared memory.
#pragma once

#include "jitattn/tile/element.cuh"
#include "jitattn/tile/staged_matrix.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct MatrixTraits {
  static constexpr bool kStagesBias = Spec::kBiasStaged != Staging::kOff;
  static constexpr bool kStagesDense = Spec::kDenseStaged != Staging::kOff;
  using Bias = Scalar<Spec::kBias == BiasKind::kFp32 ? Dtype::kFp32 : Spec::kDtype>;
  static constexpr int kBiasRows = Spec::kBiasStaged == Staging::kRow ? 1 : Spec::kBlockQ;
  using StagedBias = StagedMatrix<typename Bias::type, kBiasRows, Spec::kBlockKv>;
  using StagedDense = StagedMatrix<uint8_t, Spec::kBlockQ, Spec::kBlockKv>;
};

}  // namespace jitattn

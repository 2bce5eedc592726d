// P V with two-level accumulation: sums over a few keys are promoted to the output by ordinary
// additions, since tensor cores truncate when they accumulate, or have narrow accumulators.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

// r_o += P V with P = exponentiate(r_s), as MmaF32Acc does, promoted every kPromoteSteps steps of
// 16 keys. P is held as kParts operands A.
//   pack(part, left, right)     the parts of two neighbours of P
//   multiply(sum, p, step, n)   sum += P V of column tiles n and n + 1, for one step
//   add(out, sum)               adds the sum of one tile to the output
template <class Sum, int kParts, int kPromoteSteps, int kRowTiles, int kKeyTiles, int kColumnTiles,
          class Exponentiate, class Pack, class Multiply, class Add>
__device__ __forceinline__ void add_two_level_output(float (&r_o)[kRowTiles][kColumnTiles][4],
                                                     float (&r_s)[kRowTiles][kKeyTiles][4],
                                                     Exponentiate exponentiate, Pack pack,
                                                     Multiply multiply, Add add) {
  constexpr int kSteps = kKeyTiles / 2, kCount = min_of(kPromoteSteps, kSteps);
#pragma unroll
  for (int first = 0; first < kSteps; first += kPromoteSteps) {
    uint32_t p[kCount][kParts][kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int step = first + i;
      if (step >= kSteps) continue;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        float (&left)[4] = r_s[m][2 * step], (&right)[4] = r_s[m][2 * step + 1];
        exponentiate(left, m, 2 * step);
        exponentiate(right, m, 2 * step + 1);
        // No shuffle: the accumulators of two n8 tiles are the A fragment of one k16 step.
        const float pairs[4][2] = {
            {left[0], left[1]}, {left[2], left[3]}, {right[0], right[1]}, {right[2], right[3]}};
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          uint32_t part[kParts];
          pack(part, pairs[x][0], pairs[x][1]);
#pragma unroll
          for (int j = 0; j < kParts; ++j) p[i][j][m][x] = part[j];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      Sum sum[kRowTiles][2] = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (first + i < kSteps) multiply(sum, p[i], first + i, n);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) add(r_o[m][n + j], sum[m][j]);
      }
    }
  }
}

}  // namespace jitattn

// Online softmax in base 2 with a lazy maximum.
//
// PAPER: Milakov and Gimelshein, arXiv:1805.02867 (online softmax); Dao, arXiv:2307.08691, Alg. 1.
// We differ in the maximum: it is raised only if a score exceeds it by more than kSlack powers of
// two. Until then P may reach 2^kSlack, usually 256, which costs no accuracy in fp32 accumulators
// and fits fp16, and the output is not rescaled. If P is split into fp16 parts, its maximum is
// 2^kLift instead of 1, so that small weights keep their bits; if the output is accumulated in
// fp16, a negative kLift keeps sums in range. Rescaling factors of fp16 sums are powers of two,
// hence exact.
#pragma once

#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/accumulator.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

template <int kRowTiles, int kSlack, int kLift>
struct OnlineSoftmax {
  // NOTE: finite, so that a row that has seen no key gives exp2(-inf + kNoMax) = 0 and not NaN.
  static constexpr float kNoMax = 1e30f;
  static constexpr float kMostLifted = 0x1p22f;

  // Per row: kLift (at most 0 beyond kMostLifted) - max * scale_log2; kNoMax before the first
  // visible score.
  float neg_max[kRowTiles][2];
  float row_sum[kRowTiles][2];  // over this lane's columns; reduce() adds up the quad

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        neg_max[m][half] = kNoMax;
        row_sum[m][half] = 0.f;
      }
    }
  }

  // Fixes the maximum: the scores of cosine attention are bounded, and the bound replaces it.
  __device__ void fix_max(float neg_shift) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) neg_max[m][0] = neg_max[m][1] = neg_shift;
  }

  // Raises the maxima if any score of the warp requires it, and rescales the output. The vote is on
  // each lane's own maxima; the quad shares them in the rare branch only. The branch also keeps the
  // compiler from stretching the live ranges of scores across the exponentials. scale(m, half): the
  // factor of a score, base 2.
  template <class Tile, int kKeyTiles, int kColumnTiles, class Scale>
  __device__ void update_max(const float (&r_s)[kRowTiles][kKeyTiles][4],
                             Tile (&r_o)[kRowTiles][kColumnTiles], const Scale& scale) {
    float lane_max[kRowTiles][2];
    bool exceeds = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = fmaxf(r_s[m][0][2 * half], r_s[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kKeyTiles; ++n) {
          highest = fmaxf(highest, fmaxf(r_s[m][n][2 * half], r_s[m][n][2 * half + 1]));
        }
        lane_max[m][half] = highest;
        const float neg = scale.addend(m, half, neg_max[m][half]);
        exceeds |= fmaf(highest, scale(m, half), neg) > kLift + kSlack;
      }
    }
    if (!__any_sync(0xffffffffu, exceeds)) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = lane_max[m][half];
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const float most = scale.bare(highest) * scale(m, half);
        // The sum of both is rounded: for large |most|, P would overflow fp16.
        const float up = fabsf(most) < kMostLifted ? kLift : min_of(kLift, 0);
        float neg = up - most;
        if constexpr (kIsNarrow<Tile>) neg = floorf(neg);
        const float raised = fminf(neg_max[m][half], neg);
        const float factor = ptx::exp2_approx(raised - neg_max[m][half]);
        neg_max[m][half] = raised;
        row_sum[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) scale_row(r_o[m][n], half, factor);
      }
    }
  }

  // Raises the maxima as update_max does, but leaves the output alone, whose products are not
  // finished yet: returns whether the caller must rescale it, by these factors. (update_max in terms
  // of this makes mma.sync kernels spill.)
  template <int kKeyTiles, class Scale>
  __device__ bool raise_max(const float (&r_s)[kRowTiles][kKeyTiles][4],
                            float (&factors)[kRowTiles][2], const Scale& scale) {
    float lane_max[kRowTiles][2];
    bool exceeds = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = fmaxf(r_s[m][0][2 * half], r_s[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kKeyTiles; ++n) {
          highest = fmaxf(highest, fmaxf(r_s[m][n][2 * half], r_s[m][n][2 * half + 1]));
        }
        lane_max[m][half] = highest;
        const float neg = scale.addend(m, half, neg_max[m][half]);
        exceeds |= fmaf(highest, scale(m, half), neg) > kLift + kSlack;
      }
    }
    if (!__any_sync(0xffffffffu, exceeds)) return false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = lane_max[m][half];
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const float most = scale.bare(highest) * scale(m, half);
        // The sum of both is rounded: for large |most|, P would overflow fp16.
        const float up = fabsf(most) < kMostLifted ? kLift : min_of(kLift, 0);
        const float raised = fminf(neg_max[m][half], up - most);
        factors[m][half] = ptx::exp2_approx(raised - neg_max[m][half]);
        neg_max[m][half] = raised;
        row_sum[m][half] *= factors[m][half];
      }
    }
    return true;
  }

  template <class Tile, int kColumnTiles>
  __device__ static void rescale(Tile (&r_o)[kRowTiles][kColumnTiles],
                                 const float (&factors)[kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) scale_row(r_o[m][n], half, factors[m][half]);
      }
    }
  }

  // Replaces the scores of one n8 tile by P = exp2(score * scale - max) and adds P to the row sums.
  template <class Scale>
  __device__ void exponentiate(float (&tile)[4], int m, const Scale& scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float neg = scale.addend(m, half, neg_max[m][half]);
      const float x0 = fmaf(tile[2 * half], scale(m, half), neg);
      const float x1 = fmaf(tile[2 * half + 1], scale(m, half), neg);
      const float p0 = ptx::exp2_approx(x0);
      const float p1 = ptx::exp2_approx(x1);
      row_sum[m][half] += p0 + p1;
      tile[2 * half] = p0;
      tile[2 * half + 1] = p1;
    }
  }

  // Reduces row_sum over all columns, in all four lanes of a row.
  __device__ void reduce() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = row_sum[m][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        row_sum[m][half] = sum;
      }
    }
  }

  // Returns the natural-log LSE of a row after reduce(); -inf for a row that saw no key.
  __device__ float lse(int m, int half) const {
    const float sum = row_sum[m][half];
    if (sum == 0.f) return -infinity();
    // Times 2^-kLift: a logarithm near 0 has a smaller error.
    constexpr float kDown = kLift < 0 ? 1 << max_of(0, -kLift) : 1.f / (1 << max_of(0, kLift));
    return (ptx::log2_approx(sum * kDown) - (neg_max[m][half] - kLift)) * kLn2;
  }

  // Returns 1 / (row_sum + sink) after reduce(); 0 for a row that saw no key, so that its output is
  // 0.
  __device__ float inverse_sum(int m, int half, float sink) const {
    const float sum = row_sum[m][half];
    return sum == 0.f ? 0.f : 1.f / (sum + sink);
  }
};

}  // namespace jitattn

// Kernel      Splits fp32 operands into hi/lo fp16 parts, or rounds them to one part, for
//             tile/mma/f16_parts.cuh.
//
// Math        x 2^e = high + low, both fp16, [high | low] in a row. 2^e scales the maximum of each
//             row of Q, and of each kSplitRows rows of K or V of a head, into [2^13, 2^14). Numbers
//             down to 2^-15 of the maximum keep 22 bits, smaller ones the bits above 2^-38 of it.
//             The stored scales undo 2^e. One part is `high` alone. Keys hidden by key padding
//             become zeros, whatever they hold.
//
//             For backward kernels, which sum over rows, blocks of Q and dO share scales too.
//
// Work split  A CTA has kSplitRows rows of a head of Q, dO, K or V: blocks fastest, then heads.
#pragma once

#include "jitattn/prepare/reduce.cuh"
#include "jitattn/ptx/math.cuh"
#include "jitattn/tile/power_scale.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

constexpr int kSplitRows = kRowsPerScale;

// A block of kSplitRows rows of one head; lanes of four columns share a row.
template <class Spec, int kDim>
struct SplitBlock {
  static constexpr int kParts = Spec::kNumParts;
  static constexpr int kLanes = kDim / 4;
  static constexpr int kLoads = ceil_div(kSplitRows * kLanes, Spec::kNumThreads);

  float4 x[kLoads];

  // Loads the block. g_head: row 0 of the head. g_keeps: flags of the rows to keep, or null; the
  // others become 0.
  __device__ void load(const float* g_head, int64_t row_stride, int first_row, int len,
                       const uint8_t* g_keeps) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int idx = i * Spec::kNumThreads + threadIdx.x, row = first_row + idx / kLanes;
      bool exists = idx < kSplitRows * kLanes && row < len;
      if (exists && g_keeps != nullptr) exists = __ldg(g_keeps + row) != 0;
      x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (exists) {
        x[i] = *reinterpret_cast<const float4*>(g_head + row * row_stride + idx % kLanes * 4);
      }
    }
  }

  // Largest finite magnitude: an infinity must not scale all others to 0.
  __device__ static float most_of(const float4& v) {
    auto size = [](float value) { return fabsf(value) < infinity() ? fabsf(value) : 0.f; };
    return fmaxf(fmaxf(size(v.x), size(v.y)), fmaxf(size(v.z), size(v.w)));
  }

  // Largest magnitude of the block. Called by all threads.
  template <int kNumWarps>
  __device__ float most(float (&s_most)[kNumWarps]) const {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) largest = fmaxf(largest, most_of(x[i]));
    return largest_of_cta(largest, s_most);
  }

  // Stores row `row` of a head [len, kParts, kDim]: four columns of each part.
  __device__ static void store(uint16_t* g_head, int row, int column, const float4& v, float up) {
    const float of[4] = {v.x * up, v.y * up, v.z * up, v.w * up};
    uint2 high;
    high.x = ptx::pack_f16x2(of[0], of[1]);
    high.y = ptx::pack_f16x2(of[2], of[3]);
    uint16_t* g_row = g_head + static_cast<int64_t>(row) * (kParts * kDim) + column;
    *reinterpret_cast<uint2*>(g_row) = high;
    if constexpr (kParts == 1) return;
    auto rest = [](float value, uint32_t bits) {
      return value - ptx::f16_to_f32(static_cast<uint16_t>(bits));
    };
    uint2 low;
    low.x = ptx::pack_f16x2(rest(of[0], high.x), rest(of[1], high.x >> 16));
    low.y = ptx::pack_f16x2(rest(of[2], high.y), rest(of[3], high.y >> 16));
    *reinterpret_cast<uint2*>(g_row + kDim) = low;
  }
};

// Splits kSplitRows rows of a head with one scale. Called by all threads.
template <class Spec, int kDim>
__device__ __forceinline__ void split_block(const float* g_in, int64_t row_stride, int block,
                                            int len, const uint8_t* g_keeps, uint16_t* g_out,
                                            float* g_scale) {
  using Block = SplitBlock<Spec, kDim>;
  __shared__ float s_most[Spec::kNumThreads / 32];
  Block own;
  own.load(g_in, row_stride, block * kSplitRows, len, g_keeps);
  const PowerScale scale(own.most(s_most));
  if (threadIdx.x == 0) *g_scale = scale.down;
#pragma unroll
  for (int i = 0; i < Block::kLoads; ++i) {
    const int idx = i * Spec::kNumThreads + threadIdx.x, in_block = idx / Block::kLanes;
    const int row = block * kSplitRows + in_block;
    if (in_block >= kSplitRows || row >= len) continue;
    Block::store(g_out, row, idx % Block::kLanes * 4, own.x[i], scale.up);
  }
}

// Splits kSplitRows rows of a head, each with its own scale. Called by all threads.
template <class Spec, int kDim>
__device__ __forceinline__ void split_rows(const float* g_in, int64_t row_stride, int block,
                                           int len, uint16_t* g_out, float* g_scales) {
  using Block = SplitBlock<Spec, kDim>;
  __shared__ uint32_t s_of_row[kSplitRows];
  Block own;
  own.load(g_in, row_stride, block * kSplitRows, len, nullptr);
  if (threadIdx.x < kSplitRows) s_of_row[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Block::kLoads; ++i) {
    const int idx = i * Spec::kNumThreads + threadIdx.x;
    if (idx >= kSplitRows * Block::kLanes) continue;
    atomicMax(&s_of_row[idx / Block::kLanes], __float_as_uint(Block::most_of(own.x[i])));
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Block::kLoads; ++i) {
    const int idx = i * Spec::kNumThreads + threadIdx.x, in_block = idx / Block::kLanes;
    const int row = block * kSplitRows + in_block;
    if (in_block >= kSplitRows || row >= len) continue;
    const PowerScale scale(__uint_as_float(s_of_row[in_block]));
    Block::store(g_out, row, idx % Block::kLanes * 4, own.x[i], scale.up);
    if (idx % Block::kLanes == 0) g_scales[row] = scale.down;
  }
}

// The block of a CTA: its index within a head, and the head's index.
struct SplitWork {
  int block;
  int of_head;
  int head;
  int batch;

  __device__ SplitWork(int idx, int blocks, int heads)
      : block(idx % blocks), of_head(idx / blocks), head(of_head % heads), batch(of_head / heads) {}
};

template <class Spec>
__device__ __forceinline__ void split_fp32(const SplitFp32Params& params) {
  static_assert(sizeof(SplitFp32Params) == Spec::kParamsBytes, "host and device disagree");
  static_assert(Spec::kSmemBytes == 0);
  constexpr int kDim = Spec::kHeadDim, kDimV = Spec::kHeadDimV, kParts = Spec::kNumParts;
  const int blocks_q = ceil_div(params.len_q, kSplitRows);
  const int blocks_kv = ceil_div(params.len_kv, kSplitRows);
  const int num_q = blocks_q * params.heads_q * params.batch;
  const int num_kv = blocks_kv * params.heads_kv * params.batch;
  constexpr bool kOfGradients = Spec::kGradients == Switch::kOn;
  int rest = blockIdx.x;
  if (rest < (kOfGradients ? 2 * num_q : num_q)) {
    const bool is_d_out = kOfGradients && rest >= num_q;
    if (is_d_out) rest -= num_q;
    const SplitWork work(rest, blocks_q, params.heads_q);
    const int64_t rows_before = static_cast<int64_t>(work.of_head) * params.len_q;
    const float* g_q =
        params.q + work.batch * params.q_stride_batch + work.head * params.q_stride_head;
    uint16_t* g_q_out = params.q_out + rows_before * (kParts * kDim);
    if constexpr (!kOfGradients) {
      split_rows<Spec, kDim>(g_q, params.q_stride_row, work.block, params.len_q, g_q_out,
                             params.q_scale + rows_before);
    } else if (is_d_out) {
      split_block<Spec, kDimV>(params.d_out + work.batch * params.d_out_stride_batch +
                                   work.head * params.d_out_stride_head,
                               params.d_out_stride_row, work.block, params.len_q, nullptr,
                               params.d_out_out + rows_before * (kParts * kDimV),
                               params.d_out_scale + rest);
    } else {
      split_block<Spec, kDim>(g_q, params.q_stride_row, work.block, params.len_q, nullptr, g_q_out,
                              params.q_scale + rest);
    }
    return;
  }
  rest -= kOfGradients ? 2 * num_q : num_q;
  const bool is_v = rest >= num_kv;
  if (is_v) rest -= num_kv;
  const SplitWork work(rest, blocks_kv, params.heads_kv);
  const uint8_t* g_keeps = params.key_padding;
  if (g_keeps != nullptr) g_keeps += work.batch * params.key_padding_stride;
  const int64_t rows_before = static_cast<int64_t>(work.of_head) * params.len_kv;
  if (is_v) {
    split_block<Spec, kDimV>(
        params.v + work.batch * params.v_stride_batch + work.head * params.v_stride_head,
        params.v_stride_row, work.block, params.len_kv, g_keeps,
        params.v_out + rows_before * (kParts * kDimV), params.v_scale + rest);
  } else {
    split_block<Spec, kDim>(
        params.k + work.batch * params.k_stride_batch + work.head * params.k_stride_head,
        params.k_stride_row, work.block, params.len_kv, g_keeps,
        params.k_out + rows_before * (kParts * kDim), params.k_scale + rest);
  }
}

}  // namespace jitattn

// Kernel      Rotates vectors by their positions (rotary embedding), in place or not, and rotates
//             them back, which is the gradient: jitattn.apply_rotary.
//
// Math        x'_a = x_a cos - x_b sin,  x'_b = x_b cos + x_a sin for each pair (a, b) of columns,
//             with the angle of the row's position; in fp32, rounded once.
//
// Paper       Su et al., RoFormer, arXiv:2104.09864.
//
// Work split  A thread has kUnit pairs (RotaryPairs) of some heads of one row, and reads their
//             angles once; neighbouring threads have neighbouring pairs. If not in place, further
//             threads copy the columns after the pairs, two accesses each.
//
// Bounds      Rows of no sequence and positions outside the tables are left unchanged.
#pragma once

#include "jitattn/attention/spans.cuh"
#include "jitattn/kvcache/rotary_pairs.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// The sequence of a row and its position in it; sequence -1: none.
struct RowPlace {
  int sequence;
  int64_t place;
};

// Returns the sequence whose rows cu_seqlens[b] ... cu_seqlens[b + 1] - 1 contain `row`.
__device__ __forceinline__ RowPlace place_of_row(const int32_t* g_cu_seqlens, int batch, int word,
                                                 int64_t row) {
  int low = 0,
      high = batch + 1;  // entries before `low` are at most row, those from `high` on above it
  while (low < high) {
    const int middle = (low + high) / 2;
    if (load_index(g_cu_seqlens, middle, word) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0 || low > batch) return {-1, 0};
  return {low - 1, row - load_index(g_cu_seqlens, low - 1, word)};
}

template <class Spec>
__device__ __forceinline__ void rotary(const RotaryParams& params) {
  static_assert(sizeof(RotaryParams) == Spec::kParamsBytes,
                "host and device disagree on RotaryParams");
  static_assert(Spec::kSmemBytes == 0, "the rotary kernel uses no shared memory");
  using Pairs = RotaryPairs<Spec, Spec::kInterleaved == Switch::kOn>;
  using T = typename Pairs::T;
  constexpr int kUnit = Pairs::kUnit;

  // ---- This thread's row, heads and columns
  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * Spec::kNumThreads + static_cast<int>(threadIdx.x);
  const Division by_unit = divide(thread, params.units_per_row);
  const Division by_group = divide(by_unit.quotient, params.head_groups);
  const int unit = static_cast<int>(by_unit.rest), first_head = static_cast<int>(by_group.rest);
  const int64_t row = by_group.quotient;
  if (row >= params.num_rows) return;

  // ---- Its position
  const Division by_row = divide(row, params.len);  // ragged: one batch with all rows
  RowPlace where = {static_cast<int>(by_row.quotient), by_row.rest};
  if (params.cu_seqlens != nullptr) {
    where = place_of_row(params.cu_seqlens, params.batch, params.cu_word, row);
  }
  int64_t position = -1;
  if (where.sequence >= 0) {
    position = where.place + (params.offsets == nullptr
                                  ? params.offset
                                  : load_index(params.offsets, where.sequence, params.offset_word));
  }

  // ---- Rotate or copy its columns
  const int half = params.rotary_dim / 2, pair = unit * kUnit;
  const bool has_pairs = pair < half;
  const bool rotates = has_pairs && position >= 0 && position < params.table_rows;
  if (!rotates && params.in_place) return;
  const int rest = params.rotary_dim + (pair - half) * 2;  // for threads after the pairs
  const int first = has_pairs ? Pairs::first_column(pair) : rest;
  const int second = has_pairs ? Pairs::second_column(pair, half) : rest + kUnit;
  Pairs pairs;
  if (rotates) pairs.load_angles(params, position, pair, params.sign);
  const T* g_in = static_cast<const T*>(params.x) + by_row.quotient * params.x_stride_batch +
                  by_row.rest * params.x_stride_row;
  T* g_out = static_cast<T*>(params.out) + by_row.quotient * params.out_stride_batch +
             by_row.rest * params.out_stride_row;
  const bool has_second = second < params.head_dim;  // the last access of the rest may be alone
  for (int head = first_head; head < params.heads; head += params.head_groups) {
    const T* g_head = g_in + head * params.x_stride_head;
    T* g_head_out = g_out + head * params.out_stride_head;
    typename Pairs::Unit a = Pairs::load(g_head + first * params.x_stride_column), b = {};
    if (has_second) b = Pairs::load(g_head + second * params.x_stride_column);
    if (rotates) pairs.rotate(a, b);
    Pairs::store(g_head_out + first * params.out_stride_column, a);
    if (has_second) Pairs::store(g_head_out + second * params.out_stride_column, b);
  }
}

}  // namespace jitattn

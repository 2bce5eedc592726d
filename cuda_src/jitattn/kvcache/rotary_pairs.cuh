// A lane's share of a rotary embedding: kUnit pairs of columns, rotated in fp32 and rounded once.
//
// A pair is the columns 2 i and 2 i + 1 (interleaved), or i and i + half. In both layouts, kUnit
// neighbouring pairs are two accesses of x and kUnit neighbours in a row of the tables.
#pragma once

#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec, bool kInterleaved>
struct RotaryPairs {
  using Element = Scalar<Spec::kDtype>;
  using Table = Scalar<Spec::kTableDtype>;
  using T = typename Element::type;
  using TableT = typename Table::type;
  static constexpr int kUnit =  // elements of one access
      Spec::kAccess == Access::kVec16 ? 16 / static_cast<int>(sizeof(T)) : 1;
  static constexpr int kTableBytes = kUnit * static_cast<int>(sizeof(TableT));
  struct alignas(kUnit * sizeof(T)) Unit {
    T element[kUnit];
  };
  struct alignas(min_of(kTableBytes, 16)) TableUnit {
    TableT element[kUnit];
  };

  float cos[kUnit];
  float sin[kUnit];

  // Loads the angles of the pairs from `pair` on at a position inside the tables; sign -1 rotates
  // backwards: the gradient.
  template <class Params>
  __device__ void load_angles(const Params& params, int64_t position, int pair, float sign) {
    const auto* g_cos = static_cast<const TableT*>(params.cos) + position * params.cos_stride;
    const auto* g_sin = static_cast<const TableT*>(params.sin) + position * params.sin_stride;
    const TableUnit own_cos = *reinterpret_cast<const TableUnit*>(g_cos + pair);
    const TableUnit own_sin = *reinterpret_cast<const TableUnit*>(g_sin + pair);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      cos[i] = Table::load(own_cos.element[i]);
      sin[i] = sign * Table::load(own_sin.element[i]);
    }
  }

  // Columns of the two accesses that hold the pairs from `pair` on; there are `half` pairs.
  __device__ static int first_column(int pair) { return kInterleaved ? 2 * pair : pair; }
  __device__ static int second_column(int pair, int half) {
    return kInterleaved ? 2 * pair + kUnit : pair + half;
  }

  // Rotates each pair: (a, b) -> (a cos - b sin, b cos + a sin).
  __device__ void rotate(Unit& first, Unit& second) const {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      // Interleaved: pair i is two neighbours, and access 0 holds the first kUnit elements.
      T& a_bits = kInterleaved ? at(first, second, 2 * i) : first.element[i];
      T& b_bits = kInterleaved ? at(first, second, 2 * i + 1) : second.element[i];
      const float a = Element::load(a_bits), b = Element::load(b_bits);
      a_bits = Element::round(a * cos[i] - b * sin[i]);
      b_bits = Element::round(b * cos[i] + a * sin[i]);
    }
  }

  __device__ static Unit load(const T* g_unit) { return *reinterpret_cast<const Unit*>(g_unit); }
  __device__ static void store(T* g_unit, const Unit& unit) {
    *reinterpret_cast<Unit*>(g_unit) = unit;
  }

 private:
  __device__ static T& at(Unit& first, Unit& second, int idx) {
    return idx < kUnit ? first.element[idx] : second.element[idx - kUnit];
  }
};

}  // namespace jitattn

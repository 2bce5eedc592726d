// First row and length of a sequence, from the indices of a call.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

// The low word of index `idx`: indices are of 4 or 8 bytes, their values below 2^31.
__device__ __forceinline__ int load_index(const int32_t* g_index, int idx, int words) {
  return __ldg(g_index + static_cast<int64_t>(idx) * words);
}

struct Span {
  int start;
  int length;
};

// What start and stop of a sequence stand for; twins of the numbers in sequences.py.
enum SpanKind : int32_t {
  kStop,        // its first row (null: 0), and the row after its last
  kLength,      // its first row (null: 0), and its length
  kCumulative,  // the lengths of all before it, without and with it; its first row is 0
};

// `most`: the largest length; `rows`: of the tensor. No index leads out of it, whatever was given.
__device__ __forceinline__ Span load_span(const int32_t* g_start, const int32_t* g_stop, int idx,
                                          int words, int32_t kind, int most, int rows) {
  const int given = g_start == nullptr ? 0 : load_index(g_start, idx, words);
  const int stop = load_index(g_stop, idx, words);
  const int length = kind == kLength ? stop : stop - given;
  const int start = kind == kCumulative ? 0 : min_of(max_of(given, 0), rows);
  return {start, max_of(0, min_of(min_of(length, most), rows - start))};
}

}  // namespace jitattn

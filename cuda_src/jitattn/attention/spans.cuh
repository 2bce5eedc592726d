// First row and length of a sequence, from the index tensors of a call.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

// Loads the low word of index `idx`: indices have 4 or 8 bytes and values below 2^31.
__device__ __forceinline__ int load_index(const int32_t* g_index, int idx, int words) {
  return __ldg(g_index + static_cast<int64_t>(idx) * words);
}

struct Span {
  int start;
  int length;
};

// The meaning of a sequence's start and stop; the values match spec/enums.py.
enum SpanKind : int32_t {
  kStop,        // first row (null: 0), and the row after the last
  kLength,      // first row (null: 0), and the length
  kCumulative,  // sums of the lengths before it, without and with its own; its first row is 0
};

// Loads a span, clamped to the tensor whatever the indices are. `most`: the largest length; `rows`:
// the rows of the tensor.
__device__ __forceinline__ Span load_span(const int32_t* g_start, const int32_t* g_stop, int idx,
                                          int words, int32_t kind, int most, int rows) {
  const int given = g_start == nullptr ? 0 : load_index(g_start, idx, words);
  const int stop = load_index(g_stop, idx, words);
  const int length = kind == kLength ? stop : stop - given;
  const int start = kind == kCumulative ? 0 : min_of(max_of(given, 0), rows);
  return {start, max_of(0, min_of(min_of(length, most), rows - start))};
}

}  // namespace jitattn

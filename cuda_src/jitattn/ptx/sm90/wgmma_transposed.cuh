// Products of a warpgroup, d += a^T * b, with both in shared memory. PTX ISA: "wgmma".
#pragma once

#include "jitattn/ptx/sm90/wgmma.cuh"
#include "jitattn/types.cuh"

namespace jitattn::ptx {

// clang-format off
#define JITATTN_WGMMA_TRANSPOSED(n, columns, type, mode, adds, a, b)                                \
  JITATTN_WGMMA(n, columns, type, mode, adds, "%" a ", %" b, "1, 1", "l"(a_desc), "l"(b_desc))

// d = A^T B or, with kAdds, d += A^T B, of A [16, 64] and B [16, kColumns], both with contiguous
// rows in shared memory, of bf16 or fp16.
template <bool kIsBf16, int kColumns, bool kAdds>
__device__ __forceinline__ void wgmma_transposed(float (&d)[kColumns / 2], uint64_t a_desc,
                                                 uint64_t b_desc) {
  static_assert(kColumns % 16 == 0 && kColumns <= 64);
#define JITATTN_CASE_OF(n, columns, is_bf16, type, a, b)                                            \
  if constexpr (kColumns == columns && kIsBf16 == is_bf16) {                                        \
    if constexpr (kAdds) {                                                                          \
      JITATTN_WGMMA_TRANSPOSED(n, columns, type, JITATTN_ADD, "1", a, b);                           \
    } else {                                                                                        \
      JITATTN_WGMMA_TRANSPOSED(n, columns, type, JITATTN_SET, "0", a, b);                           \
    }                                                                                               \
  }
#define JITATTN_CASE(n, columns, a, b)               \
  JITATTN_CASE_OF(n, columns, true, "bf16", a, b)    \
  JITATTN_CASE_OF(n, columns, false, "f16", a, b)
  JITATTN_CASE(1, 16, "8", "9")
  JITATTN_CASE(2, 32, "16", "17")
  JITATTN_CASE(3, 48, "24", "25")
  JITATTN_CASE(4, 64, "32", "33")
#undef JITATTN_CASE
#undef JITATTN_CASE_OF
}
#undef JITATTN_WGMMA_TRANSPOSED
// clang-format on

}  // namespace jitattn::ptx

// Products of a warpgroup, d += a * b, with b (and a) in shared memory. PTX ISA: "wgmma".
//
// A product is asynchronous: between wgmma_fence and wgmma_wait nothing may touch its registers.
// Operand numbers of an asm statement are part of its text, hence one line for each width.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// wgmma.fence.sync.aligned: registers and shared memory written before are seen by products
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group.sync.aligned
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group.sync.aligned: waits until at most kPending groups are unfinished
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to accumulators across this place.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Likewise of operands in registers.
template <int kSteps>
__device__ __forceinline__ void wgmma_hold(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < kSteps * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Tells memory checkers whether the results of the products that follow are dropped: their operands
// may then be written meanwhile. No instruction.
__device__ __forceinline__ void wgmma_results_are_dropped(bool) {}

// clang-format off
// Eight accumulators of a lane: their operand numbers, and their constraints.
#define JITATTN_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JITATTN_D1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define JITATTN_D2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define JITATTN_D3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define JITATTN_D4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define JITATTN_D5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define JITATTN_D6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define JITATTN_D7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define JITATTN_D8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define JITATTN_D9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define JITATTN_D10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define JITATTN_D11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define JITATTN_D12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define JITATTN_D13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define JITATTN_D14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define JITATTN_D15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define JITATTN_F(mode, i)                                                                   \
  mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3]), mode(d[i + 4]), mode(d[i + 5]), \
  mode(d[i + 6]), mode(d[i + 7])
// The accumulators of 16 n columns.
#define JITATTN_D_1 JITATTN_D0
#define JITATTN_D_2 JITATTN_D_1 ", " JITATTN_D1
#define JITATTN_D_3 JITATTN_D_2 ", " JITATTN_D2
#define JITATTN_D_4 JITATTN_D_3 ", " JITATTN_D3
#define JITATTN_D_5 JITATTN_D_4 ", " JITATTN_D4
#define JITATTN_D_6 JITATTN_D_5 ", " JITATTN_D5
#define JITATTN_D_7 JITATTN_D_6 ", " JITATTN_D6
#define JITATTN_D_8 JITATTN_D_7 ", " JITATTN_D7
#define JITATTN_D_9 JITATTN_D_8 ", " JITATTN_D8
#define JITATTN_D_10 JITATTN_D_9 ", " JITATTN_D9
#define JITATTN_D_11 JITATTN_D_10 ", " JITATTN_D10
#define JITATTN_D_12 JITATTN_D_11 ", " JITATTN_D11
#define JITATTN_D_13 JITATTN_D_12 ", " JITATTN_D12
#define JITATTN_D_14 JITATTN_D_13 ", " JITATTN_D13
#define JITATTN_D_15 JITATTN_D_14 ", " JITATTN_D14
#define JITATTN_D_16 JITATTN_D_15 ", " JITATTN_D15
#define JITATTN_F_1(mode) JITATTN_F(mode, 0)
#define JITATTN_F_2(mode) JITATTN_F_1(mode), JITATTN_F(mode, 8)
#define JITATTN_F_3(mode) JITATTN_F_2(mode), JITATTN_F(mode, 16)
#define JITATTN_F_4(mode) JITATTN_F_3(mode), JITATTN_F(mode, 24)
#define JITATTN_F_5(mode) JITATTN_F_4(mode), JITATTN_F(mode, 32)
#define JITATTN_F_6(mode) JITATTN_F_5(mode), JITATTN_F(mode, 40)
#define JITATTN_F_7(mode) JITATTN_F_6(mode), JITATTN_F(mode, 48)
#define JITATTN_F_8(mode) JITATTN_F_7(mode), JITATTN_F(mode, 56)
#define JITATTN_F_9(mode) JITATTN_F_8(mode), JITATTN_F(mode, 64)
#define JITATTN_F_10(mode) JITATTN_F_9(mode), JITATTN_F(mode, 72)
#define JITATTN_F_11(mode) JITATTN_F_10(mode), JITATTN_F(mode, 80)
#define JITATTN_F_12(mode) JITATTN_F_11(mode), JITATTN_F(mode, 88)
#define JITATTN_F_13(mode) JITATTN_F_12(mode), JITATTN_F(mode, 96)
#define JITATTN_F_14(mode) JITATTN_F_13(mode), JITATTN_F(mode, 104)
#define JITATTN_F_15(mode) JITATTN_F_14(mode), JITATTN_F(mode, 112)
#define JITATTN_F_16(mode) JITATTN_F_15(mode), JITATTN_F(mode, 120)

// Sets accumulators, or adds to them.
#define JITATTN_SET(x) "=f"(x)
#define JITATTN_ADD(x) "+f"(x)
// wgmma.mma_async.sync.aligned.m64n<columns>k16.f32.<type>.<type>, n = columns / 16
#define JITATTN_WGMMA(n, columns, type, mode, adds, a_and_b, modes, ...)                            \
  asm volatile("{ .reg .pred adds; setp.ne.b32 adds, " adds ", 0; "                                 \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                \
               " {" JITATTN_D_##n "}, " a_and_b ", adds, 1, 1, " modes "; }"                        \
               : JITATTN_F_##n(mode) : __VA_ARGS__)
#define JITATTN_WGMMA_SS(n, columns, type, mode, adds, a, b)                                        \
  JITATTN_WGMMA(n, columns, type, mode, adds, "%" a ", %" b, "0, 0", "l"(a_desc), "l"(b_desc))
#define JITATTN_WGMMA_RS(n, columns, type, a0, a1, a2, a3, b)                                       \
  JITATTN_WGMMA(n, columns, type, JITATTN_ADD, "1", "{%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b, "1", \
                "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc))

// d = A B^T or, with kAdds, d += A B^T, of A [64, 16] and B [kColumns, 16], both with contiguous
// columns in shared memory, of bf16 or fp16.
template <bool kIsBf16, int kColumns, bool kAdds>
__device__ __forceinline__ void wgmma_rows(float (&d)[kColumns / 2], uint64_t a_desc,
                                           uint64_t b_desc) {
  static_assert(kColumns % 16 == 0 && kColumns <= 256);
#define JITATTN_CASE_OF(n, columns, is_bf16, type, a, b)                                            \
  if constexpr (kColumns == columns && kIsBf16 == is_bf16) {                       \
    if constexpr (kAdds) {                                                                          \
      JITATTN_WGMMA_SS(n, columns, type, JITATTN_ADD, "1", a, b);                                   \
    } else {                                                                                        \
      JITATTN_WGMMA_SS(n, columns, type, JITATTN_SET, "0", a, b);                                   \
    }                                                                                               \
  }
#define JITATTN_CASE(n, columns, a, b)               \
  JITATTN_CASE_OF(n, columns, true, "bf16", a, b)    \
  JITATTN_CASE_OF(n, columns, false, "f16", a, b)
  JITATTN_CASE(1, 16, "8", "9")
  JITATTN_CASE(2, 32, "16", "17")
  JITATTN_CASE(3, 48, "24", "25")
  JITATTN_CASE(4, 64, "32", "33")
  JITATTN_CASE(5, 80, "40", "41")
  JITATTN_CASE(6, 96, "48", "49")
  JITATTN_CASE(7, 112, "56", "57")
  JITATTN_CASE(8, 128, "64", "65")
  JITATTN_CASE(9, 144, "72", "73")
  JITATTN_CASE(10, 160, "80", "81")
  JITATTN_CASE(11, 176, "88", "89")
  JITATTN_CASE(12, 192, "96", "97")
  JITATTN_CASE(13, 208, "104", "105")
  JITATTN_CASE(14, 224, "112", "113")
  JITATTN_CASE(15, 240, "120", "121")
  JITATTN_CASE(16, 256, "128", "129")
#undef JITATTN_CASE
#undef JITATTN_CASE_OF
}

// d += A B, of A [64, 16] in registers and B [16, kColumns] in shared memory, rows contiguous.
template <bool kIsBf16, int kColumns>
__device__ __forceinline__ void wgmma_columns(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                              uint64_t b_desc) {
  static_assert(kColumns % 16 == 0 && kColumns <= 256);
#define JITATTN_CASE(n, columns, a0, a1, a2, a3, b)                               \
  if constexpr (kColumns == columns && kIsBf16) {                  \
    JITATTN_WGMMA_RS(n, columns, "bf16", a0, a1, a2, a3, b);                      \
  } else if constexpr (kColumns == columns) {                                     \
    JITATTN_WGMMA_RS(n, columns, "f16", a0, a1, a2, a3, b);                       \
  }
  JITATTN_CASE(1, 16, "8", "9", "10", "11", "12")
  JITATTN_CASE(2, 32, "16", "17", "18", "19", "20")
  JITATTN_CASE(3, 48, "24", "25", "26", "27", "28")
  JITATTN_CASE(4, 64, "32", "33", "34", "35", "36")
  JITATTN_CASE(5, 80, "40", "41", "42", "43", "44")
  JITATTN_CASE(6, 96, "48", "49", "50", "51", "52")
  JITATTN_CASE(7, 112, "56", "57", "58", "59", "60")
  JITATTN_CASE(8, 128, "64", "65", "66", "67", "68")
  JITATTN_CASE(9, 144, "72", "73", "74", "75", "76")
  JITATTN_CASE(10, 160, "80", "81", "82", "83", "84")
  JITATTN_CASE(11, 176, "88", "89", "90", "91", "92")
  JITATTN_CASE(12, 192, "96", "97", "98", "99", "100")
  JITATTN_CASE(13, 208, "104", "105", "106", "107", "108")
  JITATTN_CASE(14, 224, "112", "113", "114", "115", "116")
  JITATTN_CASE(15, 240, "120", "121", "122", "123", "124")
  JITATTN_CASE(16, 256, "128", "129", "130", "131", "132")
#undef JITATTN_CASE
}
// clang-format on

}  // namespace jitattn::ptx

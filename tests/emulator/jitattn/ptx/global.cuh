#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

inline void red_add(float* g_sum, float value) { *g_sum += value; }

inline void red_add_v2(float* g_sum, float x, float y) {
  if (reinterpret_cast<uintptr_t>(g_sum) % 8) emulator::fail("a red.v2 is not aligned");
  g_sum[0] += x;
  g_sum[1] += y;
}

inline void red_add_v4(float* g_sum, const float (&value)[4]) {
  if (reinterpret_cast<uintptr_t>(g_sum) % 16) emulator::fail("a red.v4 is not aligned");
  for (int i = 0; i < 4; ++i) g_sum[i] += value[i];
}

// CTAs run one after another: the awaited value must come from an earlier one.
inline int32_t ld_acquire(const int32_t* g_flag) {
  emulator::watch(g_flag, 4, emulator::Access::kRead);
  const emulator::AtWork at_work;
  static const int32_t* last = nullptr;
  static long looks = 0;
  looks = last == g_flag ? looks + 1 : 0;
  last = g_flag;
  if (looks > 100000000) emulator::fail("a CTA waits for a later one");
  return *g_flag;
}

inline void red_release_add(int32_t* g_flag, int32_t value) { *g_flag += value; }

}  // namespace jitattn::ptx

// Entries of block lists in memory: the index of a group of 16 keys, and above it which rows see all
// that exists of it, as far as a mask function goes; then the group's cells (BlockListArguments).
#pragma once

#include "jitattn/types.cuh"

namespace jitattn {

constexpr int kWholeRows = 64;  // rows of a list tile that have a bit of their own
constexpr int kWholeShift = 28;

__device__ __forceinline__ int group_of(const int2& entry) {
  return entry.x & ((1 << kWholeShift) - 1);
}
// Bit i: a mask function hides none of the group's keys from the tile's rows from i kWholeRows on.
__device__ __forceinline__ uint32_t whole_of(const int2& entry) {
  return static_cast<uint32_t>(entry.x) >> kWholeShift;
}

}  // namespace jitattn

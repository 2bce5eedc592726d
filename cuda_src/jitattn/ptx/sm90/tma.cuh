// Tile copies by the tensor memory accelerator. PTX ISA: "cp.async.bulk.tensor".
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// The driver's CUtensorMap: address, sizes and strides of a tensor, and a box of it.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// prefetch.tensormap
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes: copies the box
// at (column, row, head, batch) to shared memory, with zeros where it leaves the tensor
__device__ __forceinline__ void tma_load(uint32_t s_box, const TensorMap& map, uint32_t s_barrier,
                                         int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(s_box),
      "l"(&map), "r"(s_barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// cp.async.bulk.tensor.5d: likewise, the box at (column, head, row, kv head, batch)
__device__ __forceinline__ void tma_load_packed(uint32_t s_box, const TensorMap& map,
                                                uint32_t s_barrier, int column, int head, int row,
                                                int kv_head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(s_box),
      "l"(&map), "r"(s_barrier), "r"(column), "r"(head), "r"(row), "r"(kv_head), "r"(batch)
      : "memory");
}

// fence.proxy.async.shared::cta: orders this thread's accesses to shared memory before those of TMA
// and wgmma that follow
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace jitattn::ptx

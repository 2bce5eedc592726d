// Instructions that one lane of a warp issues, elected within the same statement: in a branch around
// them, operands would move from uniform to vector registers. All lanes of the warp must get there.
// PTX ISA: "elect.sync", "cp.async.bulk.tensor", "cp.reduce.async.bulk", "mbarrier".
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

struct TensorMap;  // tma.cuh

#define JITATTN_ELECTED "{ .reg .pred elected; elect.sync _|elected, 0xffffffff; @elected "

// mbarrier.arrive.shared::cta.b64
__device__ __forceinline__ void mbarrier_arrive_elected(uint32_t s_barrier) {
  asm volatile(JITATTN_ELECTED "mbarrier.arrive.shared::cta.b64 _, [%0]; }" ::"r"(s_barrier)
               : "memory");
}

// mbarrier.arrive.expect_tx.shared::cta.b64
__device__ __forceinline__ void mbarrier_arrive_expect_elected(uint32_t s_barrier,
                                                               uint32_t num_bytes) {
  asm volatile(JITATTN_ELECTED
               "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1; }" ::"r"(s_barrier),
               "r"(num_bytes)
               : "memory");
}

// cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes: copies the box
// at (column, row, head, batch) to shared memory, with zeros where it leaves the tensor
__device__ __forceinline__ void tma_load_elected(uint32_t s_box, const TensorMap& map,
                                                 uint32_t s_barrier, int column, int row, int head,
                                                 int batch) {
  asm volatile(JITATTN_ELECTED
               "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2]; }" ::"r"(s_box),
               "l"(&map), "r"(s_barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

// cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32: adds num_bytes from shared memory
__device__ __forceinline__ void bulk_reduce_add_elected(float* g_sum, uint32_t s_values,
                                                        uint32_t num_bytes) {
  asm volatile(JITATTN_ELECTED
               "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2; }" ::"l"(
                   g_sum),
               "r"(s_values), "r"(num_bytes)
               : "memory");
}

#undef JITATTN_ELECTED

// cp.async.bulk.commit_group: of this lane's bulk copies
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// cp.async.bulk.wait_group.read: waits until at most kPending groups still read shared memory
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// cp.async.bulk.wait_group: waits until at most kPending groups are unfinished
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// fence.proxy.async.global: orders this thread's accesses to global memory before those of bulk
// copies that follow
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace jitattn::ptx

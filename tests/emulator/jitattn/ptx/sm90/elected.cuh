// The first lane is elected. Bulk copies to global memory are carried out when they are issued, or
// when they are waited for.
#pragma once

#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/ptx/sm90/tma.cuh"
#include "jitattn/types.cuh"

namespace jitattn::ptx {

// All lanes of a warp are there.
inline bool is_elected() {
  emulator::synchronize_warp_alone();
  return emulated_lane() == 0;
}

inline void mbarrier_arrive_elected(uint32_t s_barrier) {
  if (is_elected()) mbarrier_arrive(s_barrier);
}
inline void mbarrier_arrive_expect_elected(uint32_t s_barrier, uint32_t num_bytes) {
  if (is_elected()) mbarrier_arrive_expect(s_barrier, num_bytes);
}
inline void tma_load_elected(uint32_t s_box, const TensorMap& map, uint32_t s_barrier, int column,
                             int row, int head, int batch) {
  if (is_elected()) tma_load(s_box, map, s_barrier, column, row, head, batch);
}

inline void bulk_reduce_add_elected(float* g_sum, uint32_t s_values, uint32_t num_bytes) {
  if (!is_elected()) return;
  const emulator::AtWork at_work;
  if (reinterpret_cast<uintptr_t>(g_sum) % 16 || s_values % 16 || num_bytes % 16) {
    emulator::fail("a bulk copy is not aligned");
  }
  emulator::start_reduction([=] {
    for (uint32_t at = 0; at < num_bytes; at += 4) {
      float value;
      const unsigned char* from = emulator::at_shared(s_values + at, 4);
      emulator::watch(from, 4, emulator::Access::kRead);
      std::memcpy(&value, from, 4);
      emulator::watch(g_sum + at / 4, 4, emulator::Access::kAtomic);
      g_sum[at / 4] += value;
    }
  });
}

inline void bulk_commit() { emulator::commit_reductions(); }
template <int kPending>
void bulk_wait_read() {
  emulator::wait_for_reductions(kPending);
}
template <int kPending>
void bulk_wait() {
  emulator::wait_for_reductions(kPending);
}

inline void fence_proxy_async_global() {}

}  // namespace jitattn::ptx

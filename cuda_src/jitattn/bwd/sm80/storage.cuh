// Shared-memory addresses of both backward kernels: the tiles, and the lane addresses in them.
#pragma once

#include "jitattn/ptx/shared.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"

namespace jitattn {

// Tile addresses, as laid out by Traits. `buffer`: of Q and dO, which have kStages; `stage`: of the
// statistics and lists, which have two.
template <class Traits>
struct BwdStorage {
  uint32_t k;
  uint32_t v;
  uint32_t first_q;  // in buffer 0
  uint32_t first_d_out;
  uint32_t p;
  uint32_t ds;
  uint32_t first_stats;  // in stage 0
  uint32_t first_listed;
  uint32_t found;

  __device__ __forceinline__ BwdStorage() {
    extern __shared__ __align__(128) unsigned char s_storage[];
    k = ptx::shared_addr(s_storage);
    v = k + Traits::kOffsetV;
    first_q = k + Traits::kOffsetQ;
    first_d_out = k + Traits::kOffsetDo;
    p = k + Traits::kOffsetP;
    ds = k + Traits::kOffsetDs;
    first_stats = k + Traits::kOffsetStats;
    first_listed = k + Traits::kOffsetListed;
    found = k + Traits::kOffsetFound;
  }

  __device__ __forceinline__ uint32_t q(int buffer) const {
    return first_q + buffer * Traits::kBytesQ;
  }
  __device__ __forceinline__ uint32_t d_out(int buffer) const {
    return first_d_out + buffer * Traits::kBytesDo;
  }
  __device__ __forceinline__ uint32_t stats(int stage) const {
    return first_stats + stage * Traits::kBytesStats;
  }
  __device__ __forceinline__ uint32_t listed(int stage) const {
    return first_listed + stage * Traits::kBytesListed;
  }
};

// Lane addresses of the operands of S = Q K^T and dP = dO V^T in the scores' grid of warps
// (fragment.cuh).
template <class Traits>
struct ScoreOperands {
  uint32_t lane_q_addr;  // in buffer 0
  uint32_t lane_do_addr;
  uint32_t lane_k_addr;
  uint32_t lane_v_addr;

  __device__ __forceinline__ ScoreOperands(const BwdStorage<Traits>& storage,
                                           const typename Traits::GridS& grid, int lane_idx) {
    using LayoutQk = typename Traits::LayoutQk;
    using LayoutV = typename Traits::LayoutV;
    constexpr int kChunksQk = LayoutQk::kRowBytes / 16, kChunksV = LayoutV::kRowBytes / 16;
    lane_q_addr = storage.q(0) + grid.first_row * LayoutQk::kRowBytes +
                  lane_offset_row_first<kChunksQk>(lane_idx);
    lane_do_addr = storage.d_out(0) + grid.first_row * LayoutV::kRowBytes +
                   lane_offset_row_first<kChunksV>(lane_idx);
    lane_k_addr = storage.k + grid.first_column * LayoutQk::kRowBytes +
                  lane_offset_chunk_first<kChunksQk>(lane_idx);
    lane_v_addr = storage.v + grid.first_column * LayoutV::kRowBytes +
                  lane_offset_chunk_first<kChunksV>(lane_idx);
  }
};

}  // namespace jitattn

// Stores dK and dV of a warpgroup's keys: through shared memory, so that whole rows are written at a
// time; or, as fp32 parts, from registers.
#pragma once

#include "jitattn/bwd/sm80/store_gradients.cuh"
#include "jitattn/bwd/sm90/traits.cuh"
#include "jitattn/bwd/sm90/work.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/sm90/stmatrix.cuh"
#include "jitattn/ptx/sm90/warpgroup.cuh"
#include "jitattn/tile/element.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Rows of dK and dV that a warp holds, with all columns (as tile/warp_grid.cuh).
struct WarpKeyRows {
  int first_row;
  int num_tiles;
  static constexpr int first_column = 0;
};

template <class Spec>
struct KeyGradients {
  using Traits = BwdSm90Traits<Spec>;
  using Params = typename Traits::Params;
  using Work = BwdSm90Work<Spec>;
  // Rows of V, which their warpgroup alone has read, make room for the results.
  static constexpr bool kStagesDk = Traits::kPagesQk <= Traits::kPagesV;

  const Params& params;
  const uint32_t s_addr;
  const int group;
  const int lane_idx;

  // dK or dV in global memory: the address of the warpgroup's first key.
  struct Place {
    void* gradient;
    int64_t split, batch, row, head;

    template <class T>
    __device__ T* first(const Work& work) const {
      return static_cast<T*>(gradient) + work.own.split * split + work.own.batch * batch +
             (work.sequence.kv_start + work.first_key) * row + work.own.kv_head * head;
    }
  };

  // The CTA's work is derived again: the main loop has no registers to hold it.
  template <class Dk, class Dv>
  __device__ __forceinline__ void store(const Dk& r_dk, const Dv& r_dv) const {
    const Work work(params);
    const Place dk = {params.dk, params.dk_stride_split, params.dk_stride_batch,
                      params.dk_stride_row, params.dk_stride_head};
    const Place dv = {params.dv, params.dv_stride_split, params.dv_stride_batch,
                      params.dv_stride_row, params.dv_stride_head};
    if (params.in_parts) {
      const bool adds = params.in_parts == kAddedParts;
      store_directly<Dtype::kFp32, Spec::kHeadDim>(work, r_dk, dk, 1.f, adds);
      store_directly<Dtype::kFp32, Spec::kHeadDimV>(work, r_dv, dv, 1.f, adds);
      return;
    }
    const float unscale = params.d_out_scale == nullptr ? 1.f : __ldg(params.d_out_scale + 1);
    synchronize();  // products of all its warps have read V
    store_staged<Spec::kHeadDimV>(work, r_dv, dv, unscale);
    if constexpr (kStagesDk) {
      synchronize();  // dV has been read
      store_staged<Spec::kHeadDim>(work, r_dk, dk, params.scale * unscale);
    } else {
      store_directly<Spec::kDtype, Spec::kHeadDim>(work, r_dk, dk, params.scale * unscale, false);
    }
  }

 private:
  __device__ void synchronize() const { ptx::named_barrier_sync(kOwnKeysBarrier + group, 128); }
  __device__ static int warp_in_group() { return static_cast<int>(threadIdx.x) / 32 % 4; }

  template <Dtype kDtype, int kHeadDim, int kTiles>
  __device__ __forceinline__ void store_directly(const Work& work, const float (&r)[1][kTiles][4],
                                                 const Place& place, float scale, bool adds) const {
    const WarpKeyRows rows = {group * 64 + warp_in_group() * 16, kTiles};
    store_gradient<kDtype, kHeadDim>(
        r, rows, place.template first<typename Scalar<kDtype>::type>(work), place.row,
        work.num_keys, [](int key) { return key; }, scale, adds, lane_idx);
  }

  // Rows are stored as TMA would: pages of 64 columns, chunks of 16 bytes permuted by row % 8.
  template <int kHeadDim, int kTiles>
  __device__ __forceinline__ void store_staged(const Work& work, const float (&r)[1][kTiles][4],
                                               const Place& place, float scale) const {
    const uint32_t s_rows = s_addr + Traits::kOffsetV + group * (64 * kPageRowBytes);
    const int row = warp_in_group() * 16 + lane_idx % 16;
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&tile)[4] = r[0][2 * pair + i / 2];
        words[i] =
            Scalar<Spec::kDtype>::round_pair(tile[i % 2 * 2] * scale, tile[i % 2 * 2 + 1] * scale);
      }
      const int chunk = (pair % 4 * 2 + lane_idx / 16) ^ row % 8;
      ptx::stmatrix_x4(s_rows + pair / 4 * Traits::kBytesKeyPage + row * kPageRowBytes + chunk * 16,
                       words);
    }
    synchronize();
    // Eight lanes write the chunks of a row's page.
    uint16_t* g_first = place.template first<uint16_t>(work);
    const int thread_idx = static_cast<int>(threadIdx.x) % 128, column = thread_idx % 8;
#pragma unroll
    for (int i = 0; i < 64 / 16; ++i) {
      const int key = thread_idx / 8 + i * 16;
      const bool exists = group * 64 + key < work.num_keys;
      uint16_t* g_row = g_first + static_cast<int64_t>(group * 64 + key) * place.row + column * 8;
#pragma unroll
      for (int page = 0; page < ceil_div(kHeadDim, kPageColumns); ++page) {
        const Vec16 chunk = ptx::ld_shared_v4(s_rows + page * Traits::kBytesKeyPage +
                                              key * kPageRowBytes + (column ^ key % 8) * 16);
        if (exists && page * kPageColumns + column * 8 < kHeadDim) {
          *reinterpret_cast<Vec16*>(g_row + page * kPageColumns) = chunk;
        }
      }
    }
  }
};

}  // namespace jitattn

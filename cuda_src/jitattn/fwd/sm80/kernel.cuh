// What        Forward attention on mma.sync, ldmatrix and cp.async: sm_80 and every newer GPU.
//
// Math        S = Q K^T,  P = exp2(S * scale_log2 - m),  O = P V / rowsum(P),
//             LSE = (log2(rowsum P) + m) * ln 2, with a running maximum m per row.
//
// Paper       Dao, FlashAttention-2, arXiv:2307.08691, Algorithm 1. We differ in: the lazy maximum
//             (softmax.cuh), key blocks visited from right to left, GQA rows packed into the tile
//             (rows.cuh), and warps that may split the keys of a step among them.
//
// Work split  One CTA: kBlockQ rows of one kv head's queries (schedule.cuh) and a range of key
//             blocks. Warp (warp_q, warp_kv) owns kWarpRows rows and kWarpKeys of each block's
//             keys.
//
// Shared      Q [kBlockQ, kDim] for the whole run, K [kStages][kBlockKv, kDim],
// memory      V [kStages][kBlockKv, kDimV], all swizzled (tile/swizzle.cuh). Afterwards: partial
//             results of the warps, then the output tile.
//
// Pipeline    kStages >= 2: a ring. Step i waits for its block, meets the one barrier, starts the
//             copy of block i + kStages - 1 into the buffer that step i - 1 left, and computes.
//               step i   | wait i | barrier | start i+1 | S_i  softmax  O_i |
//               step i+1                                 (i+1 lands)        | wait i+1 | barrier
//               ...
//             kStages == 1: K and V have a buffer each. V_i lands under S_i, K_i+1 under softmax
//             and O_i, for two barriers a step and half the shared memory.
//
// Sequences   Batched, ragged, or keys in pages (sequence.cuh, gathered_rows.cuh). Splits of a
//             tile's keys are merged, in their order, by the CTA that finishes last
//             (split_merge.cuh).
//
// Sums        The output is summed in fp32, or in fp16, of 2048 keys at a time
//             (tile/parked_sums.cuh).
//
// Masks       Positions decide which blocks a CTA visits (KvBlockRange): causal, a window with the
//             first keys, local + stride; or lists in memory do (key_lists.cuh). Scores are changed
//             in score.cuh, hidden in mask.cuh.
#pragma once

#include "jitattn/attention/dropout.cuh"
#include "jitattn/attention/epilogue.cuh"
#include "jitattn/attention/key_lists.cuh"
#include "jitattn/attention/mask.cuh"
#include "jitattn/attention/row_scale.cuh"
#include "jitattn/attention/rows.cuh"
#include "jitattn/attention/schedule.cuh"
#include "jitattn/attention/score.cuh"
#include "jitattn/attention/sequence.cuh"
#include "jitattn/attention/softmax.cuh"
#include "jitattn/debug.cuh"
#include "jitattn/fwd/sm80/gathered_rows.cuh"
#include "jitattn/fwd/sm80/traits.cuh"
#include "jitattn/ptx/cp_async.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/special.cuh"
#include "jitattn/tile/fragment.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
__device__ __forceinline__ void attn_fwd(const FwdParamsOf<Spec>& params) {
  using Traits = FwdTraits<Spec>;
  using Mma = typename Traits::Mma;
  using Element = typename Traits::Element;
  using ElementQk = typename Traits::ElementQk;
  constexpr int kStages = Spec::kStages;
  constexpr int kPrefetch = kStages == 1 ? 1 : kStages - 1;  // blocks in flight ahead of a step
  constexpr int kBlockKv = Spec::kBlockKv;
  constexpr int64_t kElementBytes = sizeof(Element), kBytesOfQk = sizeof(ElementQk);

  // ---- Indices
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int warp_q = warp_idx % Spec::kWarpsQ, warp_kv = warp_idx / Spec::kWarpsQ;
  const WorkTile tile = work_tile<Spec>(params, blockIdx.x);
  if (!kIsUniform<Spec> && tile.batch_idx < 0) return;
  const Sequence sequence = Sequence::of<Spec>(params, tile.batch_idx);
  const RowMap rows(params, sequence.len_q);
  const KvBlockRange range = kv_block_range<Spec>(params, sequence, rows, tile);

  // ---- Pointers for this (batch, head)
  const int64_t kv_head_idx = tile.head_idx / params.heads_per_kv;
  const int64_t batch_idx = tile.batch_idx;
  const int64_t kv_batch_idx = kv_row<Spec>(params, tile.batch_idx);
  // K in 8 bits is in no page: each sequence has a row of its own (quantize.cuh).
  constexpr bool kIsOutOfPages = Traits::kIsGathered && !Traits::kGathersK;
  const int64_t k_batch_idx = kIsOutOfPages ? batch_idx : kv_batch_idx;
  const int64_t kv_start = Traits::kIsPaged ? 0 : sequence.kv_start;
  const char* g_q = reinterpret_cast<const char*>(
      static_cast<const ElementQk*>(params.q) + batch_idx * params.q_stride_batch +
      sequence.q_start * params.q_stride_row + tile.head_idx * params.q_stride_head);
  const char* g_k = reinterpret_cast<const char*>(
      static_cast<const ElementQk*>(params.k) + k_batch_idx * params.k_stride_batch +
      kv_start * params.k_stride_row + kv_head_idx * params.k_stride_head);
  const char* g_v = reinterpret_cast<const char*>(
      static_cast<const Element*>(params.v) + kv_batch_idx * params.v_stride_batch +
      kv_start * params.v_stride_row + kv_head_idx * params.v_stride_head);

  // ---- Shared storage
  extern __shared__ __align__(128) unsigned char s_storage[];
  const uint32_t s_q_addr = ptx::shared_addr(s_storage);
  const uint32_t s_k_addr = s_q_addr + Traits::kOffsetK;
  const uint32_t s_v_addr = s_q_addr + Traits::kOffsetV;
  JITATTN_DEVICE_ASSERT(s_q_addr % 128 == 0);
  if (!kIsUniform<Spec> && threadIdx.x == 0) {
    // What the epilogue needs again: kept here, not in registers.
    *reinterpret_cast<CtaPlan*>(s_storage + Traits::kOffsetPlan) = {tile, sequence};
  }

  // ---- Per-lane addresses
  const typename Traits::CopyQ copy_q(threadIdx.x, 0);
  const typename Traits::CopyK copy_k(threadIdx.x, params.k_stride_row);
  const typename Traits::CopyV copy_v(threadIdx.x, params.v_stride_row);
  using LayoutQk = Swizzle<Traits::kChunksQk>;
  using LayoutV = Swizzle<Traits::kChunksV>;
  const int warp_first_row = warp_q * Traits::kWarpRows;
  const int warp_first_key = warp_kv * Traits::kWarpKeys;
  const uint32_t lane_q_addr = s_q_addr + warp_first_row * LayoutQk::kRowBytes +
                               lane_offset_row_first<Traits::kChunksQk>(lane_idx);
  const uint32_t lane_k_addr = s_k_addr + warp_first_key * LayoutQk::kRowBytes +
                               lane_offset_chunk_first<Traits::kChunksQk>(lane_idx);
  const typename Mma::template LaneV<Traits::kChunksV> lane_v(
      s_v_addr + warp_first_key * LayoutV::kRowBytes, lane_idx);

  // ---- Register tiles
  typename Traits::OutputTile r_o[Traits::kRowTiles][Traits::kColumnTiles] = {};  // [rows, kDimV]
  typename Traits::Softmax softmax;
  if constexpr (Spec::kFixedShift == Switch::kOn) softmax.fix_max(params.neg_shift);
  const typename Traits::Parked parked(s_q_addr + Traits::kOffsetParked, threadIdx.x, range.begin,
                                       range.end);
  RowScale<Spec, Traits::kRowTiles> scale(params);

  // Copies of the next key block, from right to left, into buffer `stage`. The pointers walk: they
  // are this thread's share of the block to be copied next. Only the last block of a sequence has a
  // tail. The rows of paged keys are looked up instead, but for those in 8 bits.
  int ordinal = range.end - 1;  // of the current step
  auto block_at = [&](int ordinal) { return range.template block_at<Spec>(ordinal); };
  const int64_t k_block_bytes = params.k_stride_row * (kBlockKv * kBytesOfQk);
  const int64_t v_block_bytes = params.v_stride_row * (kBlockKv * kElementBytes);
  const char* g_k_next = copy_k.share(g_k + block_at(ordinal) * k_block_bytes);
  const char* g_v_next = copy_v.share(g_v + block_at(ordinal) * v_block_bytes);
  auto len_kv = [&] { return kIsUniform<Spec> ? params.len_kv : sequence.len_kv; };
  // Keys from the first one of a block to the end.
  auto keys_left = [&](int ordinal) {
    return (kHasLists<Spec> ? range.num_keys : len_kv()) - block_at(ordinal) * kBlockKv;
  };
  const GatheredRows<Spec> gathered(params, sequence, tile.batch_idx, s_q_addr);
  if constexpr (Traits::kIsGathered) {
    if constexpr (Traits::kGathersK) g_k = gathered.lane_k(copy_k.lane(g_k), copy_k.row);
    g_v = gathered.lane_v(copy_v.lane(g_v), copy_v.row);
  }
  // The tiles of matrices that go with a block.
  auto load_matrices = [&](int stage, int block) {
    if constexpr (Traits::kIsStaged) {
      const int first_row = tile.q_tile_idx * Spec::kBlockQ;
      auto load = [&](auto staged, uint32_t s_addr, const auto* g_matrix, int64_t head_stride,
                      int64_t row_stride) {
        decltype(staged)::template load<typename Traits::Threads>(
            s_addr, len_kv(),
            [&](int row) {
              const int own = min_of(first_row + row, rows.num_rows - 1);
              const int position = rows.position(own);
              return g_matrix + (tile.head_idx + rows.head(own, position)) * head_stride +
                     matrix_row<Spec>(sequence, position) * row_stride;
            },
            [&](int column) {
              if constexpr (kHasLists<Spec>) {
                const uint32_t s_listed = gathered.listed_addr(block);
                return load_listed(s_listed, column / 16).first_key + column % 16;
              }
              return block * kBlockKv + column;
            });
      };
      if constexpr (Traits::kStagesBias) {
        using T = typename Traits::Bias::type;
        load(typename Traits::StagedBias{},
             s_q_addr + Traits::kOffsetBias + stage * Traits::kBytesBias,
             static_cast<const T*>(params.bias) + batch_idx * params.bias_stride_batch,
             params.bias_stride_head, params.bias_stride_row);
      }
      if constexpr (Traits::kStagesDense) {
        load(typename Traits::StagedDense{},
             s_q_addr + Traits::kOffsetDense + stage * Traits::kBytesDense,
             params.dense + batch_idx * params.dense_stride_batch, params.dense_stride_head,
             params.dense_stride_row);
      }
    }
  };
  auto load_k = [&](int stage, int ahead, auto is_first) {
    load_matrices(stage, block_at(ordinal - ahead));
    const uint32_t s_addr = s_k_addr + stage * Traits::kBytesK;
    if constexpr (Traits::kGathersK) {
      copy_k.template load_rows<decltype(is_first)::value, true>(
          s_addr, g_k, keys_left(ordinal),
          [&](int skip) { return gathered.offset_k(ordinal - ahead, copy_k.row, skip); });
    } else if constexpr (decltype(is_first)::value) {
      copy_k.load_tail(s_addr, g_k_next, keys_left(ordinal));
    } else {
      copy_k.load_full(s_addr, g_k_next);
    }
    if constexpr (Traits::kGathersK) return;
    const int next = ordinal - ahead - 1;
    g_k_next -= (kHasGap<Spec> ? block_at(next + 1) - block_at(next) : 1) * k_block_bytes;
  };
  auto load_v = [&](int stage, int ahead, auto is_first) {
    const uint32_t s_addr = s_v_addr + stage * Traits::kBytesV;
    if constexpr (Traits::kIsGathered) {
      copy_v.template load_rows<decltype(is_first)::value, true>(
          s_addr, g_v, keys_left(ordinal),
          [&](int skip) { return gathered.offset_v(ordinal - ahead, copy_v.row, skip); });
    } else if constexpr (decltype(is_first)::value) {
      copy_v.load_tail(s_addr, g_v_next, keys_left(ordinal));
    } else {
      copy_v.load_full(s_addr, g_v_next);
    }
    if constexpr (Traits::kIsGathered) return;
    const int next = ordinal - ahead - 1;
    g_v_next -= (kHasGap<Spec> ? block_at(next + 1) - block_at(next) : 1) * v_block_bytes;
  };
  auto load_q = [&] {
    const int first_row = tile.q_tile_idx * Spec::kBlockQ;
    copy_q.template load_rows<true, false>(
        s_q_addr, copy_q.lane(g_q), rows.num_rows - first_row, [&](int skip) {
          const int row = first_row + copy_q.row + skip, position = rows.position(row);
          const int own = kHasLists<Spec> ? max_of(position, sequence.first_position) : position;
          return (own * params.q_stride_row + rows.head(row, position) * params.q_stride_head) *
                 kBytesOfQk;
        });
  };

  using Scores = float[Traits::kRowTiles][Traits::kKeyTiles][4];  // [kWarpRows, kWarpKeys]

  // r_s += Q K^T
  typename Traits::HeldQ r_q;
  auto mma_s = [&](Scores& r_s, int stage) {
    const uint32_t stage_k_addr = lane_k_addr + stage * Traits::kBytesK;
    if constexpr (Traits::kHoldsQ) {
      Mma::template add_scores<Traits::kDim>(r_s, r_q, stage_k_addr);
    } else {
      Mma::template add_scores<Traits::kDim>(r_s, lane_q_addr, stage_k_addr);
    }
  };

  // r_o += exp2(r_s * scale_log2 - max) V
  using Kept = KeptWeights<Spec, Traits::kRowTiles, Traits::kKeyTiles>;
  auto exp_and_mma_o = [&](Scores& r_s, int stage, const Kept& kept) {
    auto stage_v = lane_v;
    stage_v.advance(stage * Traits::kBytesV);
    auto exponentiate = [&](float (&tile)[4], int m, int n) {
      softmax.exponentiate(tile, m, scale);
      if constexpr (Spec::kDropout == Switch::kOn) kept.apply(tile, m, n);
    };
    if constexpr (kIsInHalves<Spec>) {
      Mma::add_output(r_o, r_s, stage_v, scale.of_values, exponentiate);
    } else {
      Mma::add_output(r_o, r_s, stage_v, exponentiate);
    }
  };

  if constexpr (kIsScaled<Spec>) {
    if (kIsUniform<Spec> || ordinal >= range.begin) {  // else the tile may have no row
      scale.load_rows(
          params, rows,
          params.q_scale + batch_idx * params.q_scale_stride_batch +
              tile.head_idx * params.q_scale_stride_head + sequence.q_start,
          typename Traits::Rows{tile.q_tile_idx * Spec::kBlockQ + warp_first_row, lane_idx});
    }
  }

  // ---- Prologue: Q and the first kPrefetch blocks. Only the first one, the right-most, has a
  // tail.
  if (ordinal >= range.begin) {
    load_q();
    copy_q.zero_padding(s_q_addr);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      copy_k.zero_padding(s_k_addr + stage * Traits::kBytesK);
      copy_v.zero_padding(s_v_addr + stage * Traits::kBytesV);
    }
    if constexpr (Traits::kIsGathered) {
      using Lookup = typename GatheredRows<Spec>::Lookup;
      const int batch = gathered.batch_of(ordinal);
      const Lookup found = gathered.look_up(batch, range),
                   next = gathered.look_up(batch - 1, range);
      gathered.store(found, batch);
      gathered.store(next, batch - 1);
      ptx::barrier_sync<Traits::kNumThreads>();  // the rows of the first blocks are known to all
    }
    load_k(0, 0, TrueType{});
    if constexpr (kStages > 1) load_v(0, 0, TrueType{});
    ptx::cp_async_commit();
#pragma unroll
    for (int ahead = 1; ahead < kPrefetch; ++ahead) {
      if (ordinal - ahead >= range.begin) {
        load_k(ahead, ahead, FalseType{});
        load_v(ahead, ahead, FalseType{});
      }
      ptx::cp_async_commit();
    }
    if constexpr (Traits::kHoldsQ) {
      ptx::cp_async_wait<kPrefetch - 1>();  // it came with the first block
      ptx::barrier_sync<Traits::kNumThreads>();
      Mma::template load_q<Traits::kDim>(r_q, lane_q_addr);
    }
    if (!kIsScaled<Spec> && params.negate_q) {
      ptx::cp_async_wait<0>();
      copy_q.negate(s_q_addr);  // own chunks; the loop's first barrier publishes them
    }
  }

  // What this warp's first and last rows see. Derived anew where needed, to save registers.
  const typename Traits::Rows warp_rows = {tile.q_tile_idx * Spec::kBlockQ + warp_first_row,
                                           lane_idx};
  auto first_position = [&] { return rows.position(warp_rows.first); };
  auto last_position = [&] { return rows.position(warp_rows.template last<Traits::kRowTiles>()); };
  auto first_sees = [&] { return visible_keys<Spec>(params, sequence, first_position()); };
  auto last_sees = [&] { return visible_keys<Spec>(params, sequence, last_position()); };
  // Whether any row sees any key of a block.
  auto is_seen = [&](int block) {
    const int begin = block * kBlockKv, end = begin + kBlockKv;
    if (!kHasLists<Spec> && begin >= last_sees()) return false;
    if constexpr (kHasGap<Spec>) {
      return is_kept<Spec>(params, tile.head_idx, begin) ||
             end > first_key<Spec>(params, sequence, tile.head_idx, first_position());
    }
    return true;
  };

  auto columns_of = [&](int block) -> KeyColumns<Spec> {
    const int column = accumulator_column(lane_idx);
    if constexpr (kHasLists<Spec>) {
      return {column, gathered.listed_addr(block) + warp_first_key / 16 * 8};
    }
    return {block * kBlockKv + warp_first_key + column, 0};
  };
  auto change_scores = [&](Scores& r_s, int block, int stage) {
    if constexpr (kAddsToScores<Spec>) {
      uint32_t s_bias = 0;
      if constexpr (Traits::kStagesBias) {
        constexpr int kPitch = Spec::kBiasStaged == Staging::kRow ? 0 : Traits::StagedBias::kPitch;
        s_bias = s_q_addr + Traits::kOffsetBias + stage * Traits::kBytesBias +
                 warp_first_row * kPitch +
                 warp_first_key * static_cast<int>(sizeof(typename Traits::Bias::type));
      }
      add_to_scores<Spec>(r_s, params, sequence, rows, tile.batch_idx, tile.head_idx, warp_rows,
                          columns_of(block), s_bias);
    }
  };
  auto hide_scores = [&](Scores& r_s, int block) {
    if constexpr (kHasLists<Spec>) {
      const uint32_t s_listed = columns_of(block).s_listed;
      if (!sees_all_listed<Spec, Traits::kKeyTiles>(params, sequence, range.head, s_listed,
                                                    first_position(), last_position())) {
        mask_listed<Spec>(r_s, params, sequence, rows, range.head, s_listed, warp_rows);
      }
    }
    if constexpr (!kHasLists<Spec>) {
      mask_scores<Spec>(r_s, params, sequence, rows, tile.head_idx, warp_rows,
                        block * kBlockKv + warp_first_key);
    }
  };

  int stage = 0;
  auto step = [&](auto is_masked) {
    constexpr bool kIsMasked = decltype(is_masked)::value;
    Scores r_s = {};
    constexpr bool kIsCapped = Spec::kSoftcap == Switch::kOn;
    if constexpr (!kIsCapped && !Traits::kIsStaged) {
      // Here, so that a bias is on its way while the copies are waited for.
      if (!kIsMasked || is_seen(block_at(ordinal))) change_scores(r_s, block_at(ordinal), stage);
    }
    // Protects: this step's tiles, written by all threads' copies, before anyone reads them; and
    // the buffer that the previous step read, before the next copy overwrites it.
    ptx::cp_async_wait<kStages == 1 ? 0 : kPrefetch - 1>();
    ptx::barrier_sync<Traits::kNumThreads>();
    if constexpr (kStages > 1) {
      const int next_stage = stage == 0 ? kStages - 1 : stage - 1;  // kPrefetch ahead in the ring
      if (ordinal - kPrefetch >= range.begin) {
        load_k(next_stage, kPrefetch, FalseType{});
        load_v(next_stage, kPrefetch, FalseType{});
      }
    } else if (kIsMasked) {
      load_v(0, 0, TrueType{});
    } else {
      load_v(0, 0, FalseType{});
    }
    ptx::cp_async_commit();
    typename GatheredRows<Spec>::Lookup found;  // of the next batch of blocks
    if constexpr (Traits::kIsGathered) {
      if (gathered.is_first_of_batch(ordinal)) {
        found = gathered.look_up(gathered.batch_of(ordinal) - 1, range);
      }
    }

    const int block = block_at(ordinal);
    if constexpr (kIsScaled<Spec>) {
      scale.load_keys(params, k_batch_idx * (params.heads_q / params.heads_per_kv) + kv_head_idx,
                      block * kBlockKv + warp_first_key);
    }
    const bool sees_any = !kIsMasked || is_seen(block);
    if (sees_any) {
      if constexpr (!kIsCapped && Traits::kIsStaged) change_scores(r_s, block, stage);
      mma_s(r_s, stage);
      if constexpr (kIsQuantized<Spec>) scale.take_off(r_s);
      if constexpr (kIsCapped) {
        cap_scores<Spec>(r_s, params);
        change_scores(r_s, block, stage);
      }
      if constexpr (Traits::kStagesDense) {
        hide_staged<Spec>(r_s, warp_rows,
                          s_q_addr + Traits::kOffsetDense + stage * Traits::kBytesDense +
                              warp_first_row * Traits::StagedDense::kPitch + warp_first_key);
      }
    }
    if constexpr (kStages == 1) {
      // Protects: V of this step before anyone reads it; K of this step from the next copy.
      ptx::cp_async_wait<0>();
      ptx::barrier_sync<Traits::kNumThreads>();
      if (ordinal > range.begin) load_k(0, 1, FalseType{});
      ptx::cp_async_commit();
    }
    if (sees_any) {
      if constexpr (kIsMasked) hide_scores(r_s, block);
      if constexpr (Spec::kFixedShift == Switch::kOff) softmax.update_max(r_s, r_o, scale);
      Kept kept;
      if constexpr (Spec::kDropout == Switch::kOn) {
        kept.draw(params, sequence, rows, tile.batch_idx, tile.head_idx, warp_rows,
                  columns_of(block));
      }
      exp_and_mma_o(r_s, stage, kept);
    }
    if constexpr (Traits::kParksSums) {
      if (parked.are_due(ordinal)) parked.park(r_o, softmax.neg_max, ordinal);
    }
    if constexpr (Traits::kIsGathered) {
      if (gathered.is_first_of_batch(ordinal))
        gathered.store(found, gathered.batch_of(ordinal) - 1);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  };

  // ---- Main loops, from right to left
  if constexpr (kHasLists<Spec>) {
#pragma unroll 1
    for (; ordinal >= range.begin; --ordinal) step(TrueType{});
  } else if constexpr (kHasGap<Spec>) {
    // Ordinals of the blocks that every row sees whole: of the window, and of the first keys.
    const int seen = max_of(0, first_sees());
    const int free_end = seen / kBlockKv - range.gap;
    const int first = first_key<Spec>(params, sequence, tile.head_idx, last_position());
    const int free_begin = max_of(ceil_div(first, kBlockKv) - range.gap, range.num_kept);
    int free_kept = range.num_kept;  // local + stride: kept blocks lie before every row's own
    if constexpr (Spec::kMask == MaskKind::kWindow) {
      free_kept = min_of(min_of(params.keep_first, seen) / kBlockKv, free_kept);
    }
#pragma unroll 1
    for (; ordinal >= range.begin; --ordinal) {
      if ((ordinal >= free_begin && ordinal < free_end) || ordinal < free_kept) {
        step(FalseType{});
      } else {
        step(TrueType{});
      }
    }
  } else {
    // Blocks on a boundary of this warp's rows, then free ones.
#pragma unroll 1
    for (; ordinal >= range.begin && (ordinal + 1) * kBlockKv > first_sees(); --ordinal) {
      step(TrueType{});
    }
#pragma unroll 1
    for (; ordinal >= range.begin; --ordinal) step(FalseType{});
  }

  // ---- Epilogue
  // Found out anew, or read back: registers are dear in the loop.
  CtaPlan plan;
  if constexpr (kIsUniform<Spec>) {
    plan.tile = work_tile<Spec>(params, ptx::cta_idx());
    plan.sequence = Sequence::of<Spec>(params, plan.tile.batch_idx);
  } else {
    ptx::barrier_sync<Traits::kNumThreads>();  // the plan was written by one thread
    plan = *reinterpret_cast<const CtaPlan*>(s_storage + Traits::kOffsetPlan);
  }
  const FwdEpilogue<Spec, Traits> epilogue(params, plan, ptx::thread_idx(),
                                           ptx::shared_addr(s_storage));
  if constexpr (Traits::kParksSums) {
    WideTile r_sum[Traits::kRowTiles][Traits::kColumnTiles];
    parked.collect(r_sum, r_o, softmax.neg_max);
    epilogue.finish(r_sum, softmax);
  } else {
    epilogue.finish(r_o, softmax);
  }
}

}  // namespace jitattn

// Location of one sequence of the batch: first rows and lengths of its queries and keys.
#pragma once

#include "jitattn/attention/spans.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

// Whether the keys of a query tile are listed in memory.
template <class Spec>
constexpr bool kHasBlockLists = Spec::kMask == MaskKind::kBlockLists;

// Whether lists say which rows a mask function hides nothing from (list_entry.cuh).
template <class Spec>
constexpr bool knows_whole_blocks() {
  if constexpr (Spec::kHasFunction) return kHasBlockLists<Spec> && Spec::Function::kHasMask;
  return false;
}

// Whether all sequences of the batch have one length, known at compile time.
template <class Spec>
constexpr bool kIsUniform = Spec::kQLayout == SeqLayout::kBatched &&
                            Spec::kKvLayout == SeqLayout::kBatched && !kHasBlockLists<Spec>;

template <class Spec>
constexpr bool kIsPaged =
    Spec::kKvLayout == SeqLayout::kPaged || Spec::kKvLayout == SeqLayout::kPaged16;

// Whether a kernel block gathers small blocks of a local + stride pattern.
template <class Spec>
constexpr bool kGathersKeys = Spec::kMask == MaskKind::kFineStride;

template <class Spec>
constexpr bool kHasStride = Spec::kMask == MaskKind::kLocalStride || kGathersKeys<Spec>;

// Whether visible keys form two ranges with a gap.
template <class Spec>
constexpr bool kHasGap = Spec::kMask == MaskKind::kWindow || kHasStride<Spec>;

// Whether the kernel needs more than the scaled product q k^T, by its mask or score modifications.
template <class Spec>
constexpr bool kHasScores =
    kHasGap<Spec> || kHasBlockLists<Spec> || Spec::kBias != BiasKind::kNone ||
    Spec::kRelativeBias == Switch::kOn || Spec::kAlibi == Switch::kOn ||
    Spec::kSoftcap == Switch::kOn || Spec::kSinks == Switch::kOn ||
    Spec::kKeyPadding == Switch::kOn || Spec::kDense == Switch::kOn ||
    Spec::kDropout == Switch::kOn || Spec::kFixedShift == Switch::kOn || Spec::kHasFunction;

template <class Spec>
constexpr bool kIsQuantized =
    Spec::kNumerics == Numerics::kInt8 || Spec::kNumerics == Numerics::kInt8F16;

// Whether fp32 operands are split into fp16 parts, V as well.
template <class Spec>
constexpr bool kSplitFp32 =
    Spec::kNumerics == Numerics::kF16x3 || Spec::kNumerics == Numerics::kF16x1;

// Whether rows of Q and blocks of K have scales.
template <class Spec>
constexpr bool kIsScaled = kIsQuantized<Spec> || kSplitFp32<Spec>;

template <class Spec>
using PlainParamsOf = typename Conditional<
    kHasBlockLists<Spec>, FwdBlockListParams,
    typename Conditional<
        kHasScores<Spec>, FwdScoreParams,
        typename Conditional<kIsUniform<Spec>, FwdParams, FwdSeqParams>::type>::type>::type;

template <class Spec>
using UnscaledParamsOf =
    typename Conditional<Spec::kHasFunction, FunctionParams<PlainParamsOf<Spec>>,
                         PlainParamsOf<Spec>>::type;

template <class Spec>
using FwdParamsOf = typename Conditional<kIsScaled<Spec>, ScaledParams<UnscaledParamsOf<Spec>>,
                                         UnscaledParamsOf<Spec>>::type;

// Returns the queries of sequence batch_idx.
template <class Spec>
__device__ __forceinline__ Span q_span(const FwdParamsOf<Spec>& params, int batch_idx) {
  if constexpr (Spec::kQLayout == SeqLayout::kBatched) return {0, params.len_q};
  return load_span(params.q_start, params.q_stop, batch_idx, params.q_word, params.q_span_kind,
                   params.len_q, params.q_rows);
}

// Whether a block table may name batch rows of k and v. INT8 and split operands have one row per
// sequence.
template <class Spec>
constexpr bool kMayNameRows = Spec::kKvLayout == SeqLayout::kRagged && !kIsScaled<Spec>;

// Returns the batch row of k and v of sequence batch_idx. (A flat tensor has one row for all.)
template <class Spec>
__device__ __forceinline__ uint32_t kv_row(const FwdParamsOf<Spec>& params, int batch_idx) {
  if constexpr (kIsPaged<Spec>) return 0;
  if constexpr (kMayNameRows<Spec>) {
    if (params.block_table != nullptr) {
      return load_index(params.block_table, batch_idx, params.table_word);
    }
  }
  return batch_idx;
}

// Returns the keys of sequence batch_idx.
template <class Spec>
__device__ __forceinline__ Span kv_span(const FwdParamsOf<Spec>& params, int batch_idx) {
  if constexpr (Spec::kKvLayout == SeqLayout::kBatched) return {0, params.len_kv};
  if constexpr (kMayNameRows<Spec>) {
    // A row that does not exist has no keys.
    const bool is_named = params.block_table != nullptr;
    if (is_named && kv_row<Spec>(params, batch_idx) >= params.num_pages) return {0, 0};
  }
  return load_span(params.kv_start, params.kv_stop, batch_idx, params.kv_word, params.kv_span_kind,
                   params.len_kv, params.kv_rows);
}

constexpr int kNoLeft = -0x40000000;  // as on the host (values/masks.py)

template <class Spec>
__device__ __forceinline__ int left_of(const FwdParamsOf<Spec>& params, int corner) {
  if constexpr (Spec::kMask == MaskKind::kWindow) return params.left + corner;
  return 0;
}

template <class Spec>
__device__ __forceinline__ bool lifts_left(const FwdParamsOf<Spec>& params, int len_q) {
  if constexpr (Spec::kMask == MaskKind::kWindow) return params.full_on_decode && len_q == 1;
  return false;
}

// Lists: number of positions in the first tile before query 0.
template <class Spec>
__device__ __forceinline__ int list_shift(const FwdParamsOf<Spec>& params, const Span& q,
                                          const Span& kv) {
  if constexpr (kHasBlockLists<Spec>) {
    const int corner = params.bottom_right ? kv.length - q.length : 0;
    return (corner + params.diagonal) & params.tile_mask;
  }
  return 0;
}

struct Sequence {
  int q_start;
  int len_q;
  int kv_start;
  int len_kv;
  int diagonal;  // causal, window: query i sees keys <= i + diagonal
  int left;      // window: and keys >= i + left, or < keep_first
  // Lists: query tiles begin at list bounds, so that the first positions of a tile may not exist.
  int first_position;

  template <class Spec>
  __device__ static Sequence of(const FwdParamsOf<Spec>& params, int batch_idx) {
    if constexpr (kIsUniform<Spec>) {
      return {0, params.len_q, 0, params.len_kv, params.diagonal, left_of<Spec>(params, 0), 0};
    } else {
      const Span q = q_span<Spec>(params, batch_idx), kv = kv_span<Spec>(params, batch_idx);
      const int corner = params.bottom_right ? kv.length - q.length : 0;
      if constexpr (kHasBlockLists<Spec>) {
        const int shift = list_shift<Spec>(params, q, kv);
        const int diagonal = corner + params.diagonal - shift;
        return {q.start - shift, q.length + shift, kv.start, kv.length, diagonal, 0, shift};
      }
      const int left = lifts_left<Spec>(params, q.length) ? kNoLeft : left_of<Spec>(params, corner);
      return {q.start, q.length, kv.start, kv.length, corner + params.diagonal, left, 0};
    }
  }
};

}  // namespace jitattn

// Kernel      Appends new keys and values to a cache in place, and rotates new keys and queries by
//             their positions (rotary embedding): jitattn.attention_with_kvcache.
//
// Math        x'_a = x_a cos - x_b sin,  x'_b = x_b cos + x_a sin for each pair (a, b) of columns,
//             with the angle of the row's position; in fp32, rounded once.
//
// Paper       Su et al., RoFormer, arXiv:2104.09864. RotaryStyle selects the paired columns.
//
// Work split  ctas_per_sequence CTAs per sequence; a team of 16 lanes takes one row (token and
//             head) at a time, a lane 16 bytes of it (or one element: Access::kElement), or pairs.
//
// Bounds      A token beyond the capacity of its sequence, or on a page that does not exist, is not
//             written. Positions outside the tables of cos and sin are not rotated.
#pragma once

#include "jitattn/attention/spans.cuh"
#include "jitattn/kvcache/rotary_pairs.cuh"
#include "jitattn/types.cuh"
#include "jitattn_spec.h"

namespace jitattn {

template <class Spec>
struct Append {
  using Pairs = RotaryPairs<Spec, Spec::kRotary == RotaryStyle::kInterleaved>;
  using T = typename Pairs::T;
  using Unit = typename Pairs::Unit;
  static constexpr bool kRotates = Spec::kRotary != RotaryStyle::kNone;
  static constexpr int kTeam = 16;
  static constexpr int kTeams = Spec::kNumThreads / kTeam;
  static constexpr int kUnit = Pairs::kUnit;  // elements that a lane moves at a time

  const AppendParams& params;

  // Appends tokens. `stop`: rows in use afterwards, which may be fewer than all tokens need.
  __device__ void append_tokens(int batch_idx, int used, const Span& tokens, int stop) const {
    const int heads = 2 * params.heads_kv;  // keys, then values
    const int64_t batch = params.q_stop == nullptr ? batch_idx : 0;
    const int64_t num_rows = static_cast<int64_t>(stop - used) * heads;
    for_each_row(num_rows, heads, [&](int token, int head) {
      const int position = used + token;
      const int table_idx = position / params.page_size;
      const int64_t row_in_page = position - table_idx * params.page_size;
      const int64_t page = params.block_table == nullptr
                               ? batch_idx
                               : load_index(params.block_table + batch_idx * params.table_stride,
                                            table_idx, params.table_word);
      if (page < 0 || page >= params.num_pages) return;
      const int64_t row = tokens.start + token;
      if (head < params.heads_kv) {
        const T* g_in = static_cast<const T*>(params.k) + batch * params.k_stride_batch +
                        row * params.k_stride_row + head * params.k_stride_head;
        T* g_out = static_cast<T*>(params.k_cache) + page * params.k_cache_stride_page +
                   row_in_page * params.k_cache_stride_row + head * params.k_cache_stride_head;
        if constexpr (kRotates) {
          rotate_row(g_out, g_in, position);
        } else {
          copy_row(g_out, g_in, params.head_dim);
        }
      } else {
        head -= params.heads_kv;
        const T* g_in = static_cast<const T*>(params.v) + batch * params.v_stride_batch +
                        row * params.v_stride_row + head * params.v_stride_head;
        T* g_out = static_cast<T*>(params.v_cache) + page * params.v_cache_stride_page +
                   row_in_page * params.v_cache_stride_row + head * params.v_cache_stride_head;
        copy_row(g_out, g_in, params.head_dim_v);
      }
    });
  }

  __device__ void rotate_queries(int batch_idx, int used, const Span& queries) const {
    const int64_t batch = params.q_stop == nullptr ? batch_idx : 0;
    const int64_t num_rows = static_cast<int64_t>(queries.length) * params.heads_q;
    for_each_row(num_rows, params.heads_q, [&](int query, int head) {
      const int64_t row = queries.start + query;
      rotate_row(static_cast<T*>(params.q_out) + batch * params.q_out_stride_batch +
                     row * params.q_out_stride_row + head * params.q_out_stride_head,
                 static_cast<const T*>(params.q) + batch * params.q_stride_batch +
                     row * params.q_stride_row + head * params.q_stride_head,
                 params.q_follows ? used + query : used);
    });
  }

 private:
  // Calls f(token, head) for this team's share of the rows.
  template <class F>
  __device__ void for_each_row(int64_t num_rows, int heads, F f) const {
    const int64_t part = blockIdx.x % params.ctas_per_sequence;
    const int64_t step = static_cast<int64_t>(params.ctas_per_sequence) * kTeams;
    for (int64_t row = part * kTeams + threadIdx.x / kTeam; row < num_rows; row += step) {
      const int64_t token = row / heads;
      f(static_cast<int>(token), static_cast<int>(row - token * heads));
    }
  }

  // Calls f(first column) for this lane's units of a row.
  template <class F>
  __device__ static void for_each_unit(int dim, F f) {
    for (int column = threadIdx.x % kTeam * kUnit; column < dim; column += kTeam * kUnit) f(column);
  }

  __device__ static void copy_row(T* g_out, const T* g_in, int dim) {
    for_each_unit(dim,
                  [&](int column) { Pairs::store(g_out + column, Pairs::load(g_in + column)); });
  }

  __device__ void rotate_row(T* g_out, const T* g_in, int position) const {
    if (position >= params.table_rows) return copy_row(g_out, g_in, params.head_dim);
    const int half = params.rotary_dim / 2;
    for_each_unit(half, [&](int pair) {
      Pairs pairs;
      pairs.load_angles(params, position, pair, 1.f);
      const int first = Pairs::first_column(pair), second = Pairs::second_column(pair, half);
      Unit a = Pairs::load(g_in + first), b = Pairs::load(g_in + second);
      pairs.rotate(a, b);
      Pairs::store(g_out + first, a);
      Pairs::store(g_out + second, b);
    });
    copy_row(g_out + params.rotary_dim, g_in + params.rotary_dim,
             params.head_dim - params.rotary_dim);
  }
};

template <class Spec>
__device__ __forceinline__ void append(const AppendParams& params) {
  static_assert(sizeof(AppendParams) == Spec::kParamsBytes,
                "host and device disagree on AppendParams");
  static_assert(Spec::kSmemBytes == 0, "the append kernel uses no shared memory");
  const int batch_idx = blockIdx.x / params.ctas_per_sequence;

  // ---- Tokens of this sequence, and the number of them that fit
  const int given = params.used == nullptr ? params.used_by_all
                                           : load_index(params.used, batch_idx, params.used_word);
  const int room = static_cast<int>(
      min_of<int64_t>(static_cast<int64_t>(params.table_width) * params.page_size, 0x7fffffff));
  const int used = min_of(max_of(given, 0), room);
  Span tokens = {0, params.num_new}, queries = {0, params.len_q};
  if (params.q_stop != nullptr) {
    tokens = load_span(params.q_start, params.q_stop, batch_idx, params.q_word, params.q_span_kind,
                       params.num_new, params.q_rows);
    queries = tokens;
  }
  const int stop = used + min_of(tokens.length, room - used);

  const Append<Spec> work{params};
  work.append_tokens(batch_idx, used, tokens, stop);
  if constexpr (Append<Spec>::kRotates) work.rotate_queries(batch_idx, used, queries);
  if (blockIdx.x % params.ctas_per_sequence == 0 && threadIdx.x == 0) {
    int32_t* g_stop = params.kv_stop + static_cast<int64_t>(batch_idx) * params.stop_word;
    g_stop[0] = stop;
    if (params.stop_word == 2) g_stop[1] = 0;
  }
}

}  // namespace jitattn

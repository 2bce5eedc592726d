"""Arguments of the forward kernels, which backward kernels extend (`bwd_arguments.py`).

Beside the common fields, a kernel's arguments depend on its problem: sequence layouts, score
modifications, block lists, scales of prepared operands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import MaskKind

if TYPE_CHECKING:
    from jitattn.spec.kernel_spec import Problem

#: Parameters of every forward kernel.
FWD: Final = ArgumentStruct(
    "FwdParams",
    (
        Argument("q", "const void*", "[B, Lq, Hq, D]"),
        Argument("k", "const void*", "[B, Lkv, Hkv, D]"),
        Argument("v", "const void*", "[B, Lkv, Hkv, Dv]"),
        Argument("out", "void*", "[B, Lq, Hq, Dv]"),
        Argument("lse", "float*", "[B, Hq, Lq] or, ragged, [Hq, total]; may be null"),
        Argument(
            "partial_out",
            "float*",
            "[num_items, head_tiles, block_q, Dv], contiguous; null: no splits",
        ),
        Argument("partial_lse", "float*", "[num_items, head_tiles, block_q], contiguous"),
        Argument("arrivals", "int32_t*", "[num_items, head_tiles], all 0, and so left behind"),
        *strides("q", "batch", "row", "head"),
        *strides("k", "batch", "row", "head"),
        *strides("v", "batch", "row", "head"),
        *strides("out", "batch", "row", "head"),
        *strides("lse", "batch", "head"),
        Argument("batch", "int32_t"),
        Argument("len_q", "int32_t", "ragged: the largest"),
        Argument("len_kv", "int32_t", "ragged and paged: the largest"),
        Argument("heads_q", "int32_t"),
        Argument("heads_per_kv", "int32_t", "Hq / Hkv"),
        Argument(
            "heads_per_tile",
            "int32_t",
            "query heads packed into the rows of a tile: 1 or heads_per_kv",
        ),
        Argument("num_q_tiles", "int32_t", "ceil(len_q * heads_per_tile / block_q)"),
        Argument(
            "num_splits",
            "int32_t",
            "CTAs that share the keys of one query tile; 0: balanced on the device",
        ),
        Argument("num_slots", "int32_t", "balanced: CTAs that the GPU holds at a time"),
        Argument("diagonal", "int32_t", "causal: query i sees keys <= i + diagonal"),
        Argument(
            "negate_q",
            "int32_t",
            "1 if the scale is negative: q changes sign, the scale does not",
        ),
        Argument(
            "row_div_mul",
            "uint32_t",
            "row / heads_per_tile = (mulhi(row, mul) + row) >> shift",
        ),
        Argument("row_div_shift", "uint32_t"),
        Argument("scale_log2", "float", "|scale| * log2(e), never 0"),
    ),
)

#: Further parameters for sequence layouts. A ragged q is [total, Hq, D] (batch stride 0) or
#: [B, Lq, Hq, D]; so are k and v. A paged k is [num_pages, page_size, Hkv, D], and its batch stride
#: is that of a page.
FWD_SEQ: Final = ArgumentStruct(
    "FwdSeqParams",
    (
        Argument("q_start", "const int32_t*", "ragged: first row of each sequence; null for 0"),
        Argument("q_stop", "const int32_t*", "ragged: its length, or the row after its last"),
        Argument("kv_start", "const int32_t*", "the same of the keys"),
        Argument("kv_stop", "const int32_t*", "paged as well"),
        Argument(
            "block_table",
            "const int32_t*",
            "paged: [B, max_pages], the page of every page_size keys. ragged: [B], the row of"
            " the batch of k and v that is the sequence's; null: its own.",
        ),
        Argument("table_stride", "int64_t", "between the rows of the block table, in 4-byte words"),
        Argument(
            "bottom_right",
            "int32_t",
            "1: Lkv - Lq of each sequence is added to the diagonal",
        ),
        Argument(
            "q_word",
            "int32_t",
            "4-byte words of an index of q: 1, or 2 of which the low one is read",
        ),
        Argument("kv_word", "int32_t"),
        Argument("table_word", "int32_t"),
        Argument("q_span_kind", "int32_t", "SpanKind: what q_start and q_stop stand for"),
        Argument("kv_span_kind", "int32_t"),
        Argument("q_rows", "int32_t", "ragged: rows of the tensor, of which no index leads out"),
        Argument("kv_rows", "int32_t", "paged: of all pages that a sequence has room for"),
        Argument("num_pages", "uint32_t", "ragged: batch of k and v"),
        Argument("page_size", "int32_t"),
        Argument("page_div_mul", "uint32_t", "key / page_size, as row_div"),
        Argument("page_div_shift", "uint32_t"),
    ),
    base="FwdParams",
)

#: Further parameters for score modifications. Strides in elements; 0 for size-1 dimensions.
FWD_SCORE: Final = ArgumentStruct(
    "FwdScoreParams",
    (
        Argument("bias", "const void*", "[B, Hq, Lq, Lkv]"),
        Argument("relative_bias", "const float*", "[Hq, 2 * relative_reach + 1], by key - query"),
        Argument("alibi_slopes", "const float*", "[B, Hq]"),
        Argument("sinks", "const float*", "[Hq]"),
        Argument("key_padding", "const uint8_t*", "[B, Lkv], nonzero = attend"),
        Argument("dense", "const uint8_t*", "[B, Hq, Lq, Lkv], nonzero = attend"),
        Argument("dropout_state", "const int64_t*", "[2]: seed and offset"),
        *strides("bias", "batch", "head", "row"),
        *strides("dense", "batch", "head", "row"),
        Argument("key_padding_stride", "int64_t"),
        *strides("alibi", "batch"),
        *strides("relative", "head"),
        Argument(
            "left",
            "int32_t",
            "window: query i sees keys >= i + left, Lkv - Lq added as to diagonal,",
        ),
        Argument("keep_first", "int32_t", "and the first ones"),
        Argument(
            "full_on_decode",
            "int32_t",
            "1: no bound on the left for sequences with one query",
        ),
        Argument("relative_reach", "int32_t"),
        Argument("bias_is_paired", "int32_t", "1: two neighbours may be read in one access"),
        Argument("bias_is_shared", "int32_t", "1: all rows of a tile have the same"),
        Argument("inverse_scale", "float", "1 / |scale|"),
        Argument("softcap_in", "float", "2 log2(e) |scale| / softcap"),
        Argument("softcap_out", "float", "softcap / |scale|"),
        Argument(
            "local_blocks",
            "int32_t",
            "local + stride: blocks up to a query's own that it sees",
        ),
        Argument("stride", "int32_t", "and of those before, one in so many"),
        Argument("head_step", "int32_t", "kv head h is offset by h * head_step + head_shift"),
        Argument("head_shift", "int32_t"),
        Argument("first_dense", "int32_t", "kv heads from this one on see every block"),
        Argument("block_log2", "int32_t", "keys of a block"),
        Argument(
            "neg_shift",
            "float",
            "fixed shift: what stands for the maximum of every row, negated",
        ),
        Argument("dropout_threshold", "uint32_t", "p * 2^16"),
        Argument("dropout_scale", "float", "1 / (1 - p)"),
    ),
    base="FwdSeqParams",
)

#: Further parameters for block lists. A group is 16 keys; the queries of a list are 8 cells or 16,
#: of 8 each.
FWD_BLOCK_LIST: Final = ArgumentStruct(
    "FwdBlockListParams",
    (
        Argument(
            "list_groups",
            "const int2*",
            "(group, whether cell i sees its keys 0 to 7: bit i; 8 to 15: 16 + i)",
        ),
        Argument(
            "list_spans",
            "const int2*",
            "[num_lists, list_tiles]: first group of a list, and their number",
        ),
        Argument(
            "list_heads",
            "const int4*",
            "[2, Hq]: 2 list + 1 if positions below 0 see nothing, right, left, keep_first; "
            "and for one query alone",
        ),
        Argument("list_tiles", "int32_t", "spans of a list: one for every 2^list_log2 positions"),
        Argument("list_log2", "int32_t"),
        Argument("tile_mask", "int32_t", "positions of a query tile, a power of two, less 1"),
    ),
    base="FwdScoreParams",
)

#: Further parameters: scales of prepared operands, which are contiguous: INT8 Q and K, or all
#: three as fp16 parts, [B, H, L, parts, D]. Backward kernels have q_scale as
#: d_out_scale.
SCALED: Final = ArgumentStruct(
    "ScaledParams",
    (
        Argument("q_scale", "const float*", "as the LSE"),
        Argument("k_scale", "const float*", "[B, Hkv, ceil(Lkv / 64)]"),
        Argument("v_scale", "const float*", "as k_scale; with Q and K in 8 bits [B, Hkv], or null"),
        *strides("q_scale", "batch", "head"),
    ),
    base="Base",
)

FWD_STRUCTS: Final = (FWD, FWD_SEQ, FWD_SCORE, FWD_BLOCK_LIST, SCALED)
_UNSCALED: Final = tuple(ArgumentTable(*FWD_STRUCTS[:count]) for count in (1, 2, 3, 4))
_SCALED: Final = tuple(table.extended(SCALED) for table in _UNSCALED)
#: Every parameter struct of the forward kernels.
FWD_TABLES: Final = (*_UNSCALED, *_SCALED)


def fwd_arguments(problem: Problem) -> ArgumentTable:
    """Return the arguments of the forward kernel of a problem."""
    numerics = problem.numerics
    tables = _SCALED if numerics.is_quantized or numerics.num_parts else _UNSCALED
    if problem.mask is MaskKind.BLOCK_LISTS:
        return tables[3]
    if problem.has_scores:
        return tables[2]
    return tables[0 if problem.is_uniform else 1]

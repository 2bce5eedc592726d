"""Named tuples of the arguments of attention kernels that follow from a request alone.

Each declares a parameter struct as well: a field's annotation has its C++ type and its meaning,
from which `kernels/fwd_arguments.py` makes the argument tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, TypeAlias

from jitattn.spec.arguments import divisor
from jitattn.spec.enums import LENGTHS

if TYPE_CHECKING:
    from collections.abc import Iterable

_Index: TypeAlias = Annotated[int, "const int32_t*"]
_Table: TypeAlias = Annotated[int, "const float*"]
_Stride: TypeAlias = Annotated[int, "int64_t"]
_Int: TypeAlias = Annotated[int, "int32_t"]
_Bool: TypeAlias = Annotated[bool, "int32_t"]
_Uint: TypeAlias = Annotated[int, "uint32_t"]
_Float: TypeAlias = Annotated[float, "float"]


class SequenceArguments(NamedTuple):
    """The location of each sequence (`FwdSeqParams`).

    An absent tensor has address 0. Indices are read as 4-byte words: of an 8-byte index, the low
    word. A ragged q is [total, Hq, D] (batch stride 0) or [B, Lq, Hq, D]; so are k and v. A paged k
    is [num_pages, page_size, Hkv, D], and its batch stride is that of a page.
    """

    q_start: Annotated[_Index, "ragged: first row of each sequence; null for 0"]
    q_stop: Annotated[_Index, "ragged: its length, or the row after its last"]
    kv_start: Annotated[_Index, "the same of the keys"]
    kv_stop: Annotated[_Index, "paged as well"]
    block_table: Annotated[
        _Index,
        "paged: [B, max_pages], the page of every page_size keys. ragged: [B], the row of the "
        "batch of k and v that is the sequence's; null: its own.",
    ]
    table_stride: Annotated[_Stride, "between the rows of the block table, in 4-byte words"]
    bottom_right: Annotated[_Bool, "1: Lkv - Lq of each sequence is added to the diagonal"]
    q_word: Annotated[_Int, "4-byte words of an index of q: 1, or 2 of which the low one is read"]
    kv_word: _Int
    table_word: _Int
    q_span_kind: Annotated[_Int, "SpanKind: what q_start and q_stop stand for"]
    kv_span_kind: _Int
    q_rows: Annotated[_Int, "ragged: rows of the tensor, of which no index leads out"]
    kv_rows: Annotated[_Int, "paged: of all pages that a sequence has room for"]
    num_pages: Annotated[_Uint, "ragged: batch of k and v"]
    page_size: _Int
    page_div_mul: Annotated[_Uint, "key / page_size, as row_div"]
    page_div_shift: _Uint

    @property
    def has_memory(self) -> bool:
        """Return whether all index tensors have memory."""
        return min(self[:6]) >= 0


def alike(len_q: int, len_kv: int) -> SequenceArguments:
    """Return the sequence arguments of a uniform batch, for kernels that require them."""
    return SequenceArguments(
        0, 0, 0, 0, 0, 0, False, 1, 1, 1, LENGTHS, LENGTHS, len_q, len_kv, 0, 1, *divisor(1)
    )


class ScoreArguments(NamedTuple):
    """Score modifications beside the scale (`FwdScoreParams`).

    Strides are in elements; 0 for dimensions of size 1.
    """

    bias: Annotated[int, "const void*", "[B, Hq, Lq, Lkv]"]
    relative_bias: Annotated[_Table, "[Hq, 2 * relative_reach + 1], by key - query"]
    alibi_slopes: Annotated[_Table, "[B, Hq]"]
    sinks: Annotated[_Table, "[Hq]"]
    key_padding: Annotated[int, "const uint8_t*", "[B, Lkv], nonzero = attend"]
    dense: Annotated[int, "const uint8_t*", "[B, Hq, Lq, Lkv], nonzero = attend"]
    dropout_state: Annotated[int, "const int64_t*", "[2]: seed and offset"]
    bias_stride_batch: _Stride
    bias_stride_head: _Stride
    bias_stride_row: _Stride
    dense_stride_batch: _Stride
    dense_stride_head: _Stride
    dense_stride_row: _Stride
    key_padding_stride: _Stride
    alibi_stride_batch: _Stride
    relative_stride_head: _Stride
    #: Here without the Lkv - Lq of a sequence, unless all are alike.
    left: Annotated[_Int, "window: query i sees keys >= i + left, Lkv - Lq added as to diagonal,"]
    keep_first: Annotated[_Int, "and the first ones"]
    full_on_decode: Annotated[_Int, "1: no bound on the left for sequences with one query"]
    relative_reach: _Int
    bias_is_paired: Annotated[_Int, "1: two neighbours may be read in one access"]
    bias_is_shared: Annotated[_Int, "1: all rows of a tile have the same"]
    inverse_scale: Annotated[_Float, "1 / |scale|"]
    softcap_in: Annotated[_Float, "2 log2(e) |scale| / softcap"]
    softcap_out: Annotated[_Float, "softcap / |scale|"]
    local_blocks: Annotated[_Int, "local + stride: blocks up to a query's own that it sees"]
    stride: Annotated[_Int, "and of those before, one in so many"]
    head_step: Annotated[_Int, "kv head h is offset by h * head_step + head_shift"]
    head_shift: _Int
    first_dense: Annotated[_Int, "kv heads from this one on see every block"]
    block_log2: Annotated[_Int, "keys of a block"]
    neg_shift: Annotated[_Float, "fixed shift: what stands for the maximum of every row, negated"]
    dropout_threshold: Annotated[_Uint, "p * 2^16"]
    dropout_scale: Annotated[_Float, "1 / (1 - p)"]


class BlockListArguments(NamedTuple):
    """Block lists (`FwdBlockListParams`), without the fields that depend on the tile.

    A group is 16 keys; the queries of a list are 8 cells or 16, of 8 each.
    """

    list_groups: Annotated[
        int,
        "const int2*",
        "(group, whether cell i sees its keys 0 to 7: bit i; 8 to 15: 16 + i)",
    ]
    list_spans: Annotated[
        int,
        "const int2*",
        "[num_lists, list_tiles]: first group of a list, and their number",
    ]
    list_heads: Annotated[
        int,
        "const int4*",
        "[2, Hq]: 2 list + 1 if positions below 0 see nothing, right, left, keep_first; and for "
        "one query alone",
    ]
    list_tiles: Annotated[_Int, "spans of a list: one for every 2^list_log2 positions"]
    list_log2: _Int


_CAPTURED: Final = "captured "


def captured_name(number: int) -> str:
    """Return the name of a captured tensor among those that may have gradients."""
    return f"{_CAPTURED}{number}"


def captured_numbers(names: Iterable[str]) -> tuple[int, ...]:
    """Return the numbers of the captured tensors among these names, in order."""
    found = (name.removeprefix(_CAPTURED) for name in names if name.startswith(_CAPTURED))
    return tuple(sorted(map(int, found)))

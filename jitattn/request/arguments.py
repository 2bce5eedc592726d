"""Named tuples of the kernel arguments that follow from a request alone.

The fields are those of the argument tables (`kernels/fwd_arguments.py`), where they are explained.
"""

from __future__ import annotations

from typing import NamedTuple

from jitattn.spec.arguments import divisor
from jitattn.spec.enums import LENGTHS


class SequenceArguments(NamedTuple):
    """The location of each sequence (`FwdSeqParams`).

    An absent tensor has address 0. Indices are read as 4-byte words: of an 8-byte index, the low
    word.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    block_table: int
    table_stride: int  #: of the table's rows, in words
    bottom_right: bool  #: the diagonal of each sequence is moved by its Lkv - Lq
    q_word: int
    kv_word: int
    table_word: int
    q_span_kind: int
    kv_span_kind: int
    q_rows: int
    kv_rows: int
    num_pages: int
    page_size: int
    page_div_mul: int
    page_div_shift: int

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
    """Score modifications beside the scale (`FwdScoreParams`)."""

    bias: int
    relative_bias: int
    alibi_slopes: int
    sinks: int
    key_padding: int
    dense: int
    dropout_state: int
    bias_stride_batch: int
    bias_stride_head: int
    bias_stride_row: int
    dense_stride_batch: int
    dense_stride_head: int
    dense_stride_row: int
    key_padding_stride: int
    alibi_stride_batch: int
    relative_stride_head: int
    left: int  #: without the Lkv - Lq of a sequence, unless all are alike
    keep_first: int
    full_on_decode: int
    relative_reach: int
    bias_is_paired: int
    bias_is_shared: int
    inverse_scale: float
    softcap_in: float
    softcap_out: float
    local_blocks: int
    stride: int
    head_step: int
    head_shift: int
    first_dense: int
    block_log2: int
    neg_shift: float
    dropout_threshold: int
    dropout_scale: float


class BlockListArguments(NamedTuple):
    """Block lists (`FwdBlockListParams`), without the fields that depend on the tile."""

    list_groups: int
    list_spans: int
    list_heads: int
    list_tiles: int
    list_log2: int

"""The front door of dkernel: block-sparse attention, local + stride or any pattern.

What is better here: gradients in every mode (varied lengths, left padding, grouped heads, packed
sequences), any number of queries on a longer history, LSEs in every mode, no call that waits for
the device (`max_seqlen_q` and `max_seqlen_k` bound packed lengths), and exactly the pattern that is
asked for, whatever `block_m` and `block_n` say: they, `d_splits` and `inference` are hints
that nothing needs. What differs, on purpose:

- Rows of a square pattern count by the positions of queries among the keys, so that it is right
  for chunks of a prompt too. As in the original, any other is of the queries of the call (as
  `get_sparse_attn_mask` makes it for a part of them): its row 0 is the block of query 0.
- `causal` counts in every mode; the original is always causal with paddings and packed sequences.
- A row that sees nothing is 0, with an LSE of -inf.
- `LocalStrideSparseAttention` is a class, and every call makes a module of its own.
- `get_sparse_attn_mask` takes its `device`; `homo_head` goes with `num_kv_heads`; not causal,
  dense heads give [heads, rows, columns]; with `past_len`, the row of the block that the first
  query is in stays.
"""

from __future__ import annotations

from jitattn.compat.dkernel.interface import (
    LocalStrideSparseAttention,
    SparseAttention,
    combine_attn_partitions,
)
from jitattn.compat.dkernel.utils import get_sparse_attn_mask

__all__ = [
    "LocalStrideSparseAttention",
    "SparseAttention",
    "combine_attn_partitions",
    "get_sparse_attn_mask",
]

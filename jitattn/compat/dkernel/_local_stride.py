"""The module for local + stride patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.compat._errors import check
from jitattn.compat.dkernel._kept import LARGEST_BLOCK
from jitattn.compat.dkernel._module import SparseAttention
from jitattn.compat.dkernel.utils import local_stride_blocks, multiple_of
from jitattn.values.masks import LocalStride

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask


class LocalStrideSparseAttention(SparseAttention):
    """Attention to local blocks, and to every `vert_stride`-th of the others (phi-3-small).

    The pattern is a rule, not stored, where its heads are those of the tensors, blocks are of 128
    or fewer, and, not causal, no heads are dense and there are no more queries than keys.
    `sparse_pattern` writes it out.

    Parameters
    ----------
    num_heads : int
        Query heads.
    max_seq_len : int
        Longest history.
    block_size, local_blocks, vert_stride, homo_head, num_dense_heads, num_kv_heads, causal
        As `get_sparse_attn_mask` has them.
    head_sliding_offset : int
        As there: offset n makes block 0 attended at kv head -n modulo the stride.
    active_head_range : (int, int), optional
        The query heads of this part of the model; all without `homo_head` count.
    block_m, block_n, seq_dim, kwargs
        As `SparseAttention` has them.
    """

    def __init__(
        self,
        num_heads: int,
        max_seq_len: int,
        block_size: int,
        local_blocks: int | tuple[int, int],
        vert_stride: int,
        *,
        homo_head: bool = False,
        num_dense_heads: int = 0,
        num_kv_heads: int | None = None,
        active_head_range: tuple[int, int] | None = None,
        head_sliding_offset: int = 0,
        block_m: int | None = None,
        block_n: int | None = None,
        causal: bool = True,
        seq_dim: int | None = None,
        **kwargs: Any,  # noqa: ANN401 - the original's
    ) -> None:
        torch.nn.Module.__init__(self)
        self._set_up(block_size, causal, seq_dim, block_m, block_n, kwargs)
        part = active_head_range
        check(
            part is None or (len(part) == 2 and 0 <= part[0] < part[1] <= num_heads),
            f"active_head_range={part!r}: it must be (first, after the last) of {num_heads} heads",
        )
        self.max_seq_len = multiple_of(max_seq_len, max(block_size, block_m or 1, block_n or 1, 64))
        self.max_seqlen = self.max_seq_len
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.local_blocks, self.vert_stride = local_blocks, vert_stride
        self.homo_head, self.num_dense_heads = homo_head, num_dense_heads
        self.head_sliding_offset = head_sliding_offset
        self.active_head_range = None if homo_head else active_head_range
        self._patterns: dict[torch.device, Tensor] = {}
        self._written(1)  # raises for an invalid pattern

    @property
    def sparse_pattern(self) -> Tensor:  # type: ignore[override]
        """The pattern, [heads, blocks, blocks], bool, materialized on first use."""
        return self._pattern_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def _written(self, num_blocks: int, device: torch.device | None = None) -> Tensor:
        mask = local_stride_blocks(
            self.num_heads,
            range(num_blocks),
            range(num_blocks),
            self.local_blocks,
            self.vert_stride,
            self.homo_head,
            self.num_kv_heads,
            head_sliding_offset=self.head_sliding_offset,
            num_dense_heads=self.num_dense_heads,
            causal=self.causal,
            device=device,
        )
        if self.active_head_range is not None and len(mask) > 1:
            mask = mask[slice(*self.active_head_range)]
        return mask

    def _pattern_on(self, device: torch.device) -> Tensor:
        if device not in self._patterns:
            with torch.inference_mode(False):
                self._patterns[device] = self._written(self.max_seqlen // self.block_size, device)
        return self._patterns[device]

    @property
    def _size(self) -> tuple[int, int]:
        count = self.max_seqlen // self.block_size
        return count, count

    def _rules_of(self, heads: tuple[int, int], shift: int) -> list[Mask] | None:
        rule = self._closed_form(heads)
        # The closed form counts positions, not rows of the pattern.
        return None if rule is None or shift != 0 else [rule]

    def _closed_form(self, heads: tuple[int, int]) -> LocalStride | None:
        """Return the pattern as a positional mask, if the heads allow it."""
        # For dense heads the local blocks are irrelevant.
        local = 1 if self.vert_stride == 1 else self.local_blocks
        if self.block_size > LARGEST_BLOCK or local == 0:
            return None
        if self.homo_head:
            # The original treats a single head as head 0 of one.
            return LocalStride(
                self.block_size,
                local,
                self.vert_stride,
                head_offset=self.head_sliding_offset % self.vert_stride,
                homo_head=True,
                causal=self.causal,
            )
        heads_kv = self.num_kv_heads or self.num_heads
        group = self.num_heads // heads_kv
        first, last = self.active_head_range or (0, self.num_heads)
        is_whole = first % group == 0 and last % group == 0
        if not is_whole or heads != (last - first, (last - first) // group):
            return None
        if not self.causal and self.num_dense_heads:
            return None
        step = max(1, self.vert_stride // self.num_heads)
        dense = max(0, last // group - max(first // group, heads_kv - self.num_dense_heads))
        return LocalStride(
            self.block_size,
            local,
            self.vert_stride,
            head_step=step,
            head_offset=(first // group * step + self.head_sliding_offset) % self.vert_stride,
            num_dense_heads=dense,
            causal=self.causal,
        )

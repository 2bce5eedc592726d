"""dkernel's modules over `jitattn.attention`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.attention import attention
from jitattn.compat._errors import CheckFailedError, check
from jitattn.compat.dkernel.utils import (
    get_sparse_attn_mask,
    is_kv_cache_efficient,
    multiple_of,
    verify_sparse_pattern,
)
from jitattn.errors import InvalidInputError
from jitattn.masks import BlockSparse, LocalStride
from jitattn.merge import merge
from jitattn.sequences import Padded, Ragged

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.masks import Mask

_LARGEST_BLOCK: Final = 128
_HINTS: Final = ("out", "d_splits", "inference")


class SparseAttention(torch.nn.Module):
    """Attention by any pattern of blocks; differentiable in every mode.

    Parameters
    ----------
    block_size : int
        A power of two from 16: queries and keys of a block.
    sparse_pattern : Tensor, [rows, columns] or [heads, rows, columns]
        Nonzero = attend. One for all heads, one for each kv head or for each query head.
    causal : bool
        Let no query see keys after its own position, within blocks too.
    seq_dim : 1 or 2, optional
        Which dimension of 4-D inputs is the sequence; None is 1.
    block_m, block_n : int, optional
        Hints, checked and otherwise ignored. So are `d_splits` and `inference`.
    out : Tensor, optional
        Where to write the result of calls without gradients.

    Raises
    ------
    CheckFailedError
        As the original's assertions; it is an `AssertionError` and an `InvalidInputError`.

    Warns
    -----
    UserWarning
        A causal pattern comes back to keys that a cache could have dropped.
    """

    def __init__(
        self,
        block_size: int,
        sparse_pattern: Tensor,
        *,
        causal: bool = True,
        seq_dim: int | None = None,
        block_m: int | None = None,
        block_n: int | None = None,
        **kwargs: Any,  # noqa: ANN401 - the original's
    ) -> None:
        super().__init__()
        verify_sparse_pattern(sparse_pattern)
        pattern = sparse_pattern != 0
        if pattern.dim() == 2:
            pattern = pattern[None]
        self._set_up(block_size, causal, seq_dim, block_m, block_n, kwargs)
        is_square = pattern.shape[1] == pattern.shape[2]
        if causal and is_square and not is_kv_cache_efficient(pattern, block_size, block_size):
            warnings.warn(
                "the pattern comes back to blocks of keys that the row before did not see: a kv "
                "cache can drop nothing",
                stacklevel=2,
            )
        self.max_seqlen = max(pattern.shape[1:]) * block_size
        self.register_buffer("sparse_pattern", pattern, persistent=False)

    def _set_up(
        self,
        block_size: int,
        causal: bool,
        seq_dim: int | None,
        block_m: int | None,
        block_n: int | None,
        kwargs: dict[str, Any],
    ) -> None:
        for name, size in (("block_size", block_size), ("block_m", block_m), ("block_n", block_n)):
            is_fine = size is None or (size >= 16 and size & (size - 1) == 0)
            check(is_fine, f"{name}={size}: it must be a power of two from 16")
        check(seq_dim in (None, 1, 2), f"seq_dim={seq_dim!r}: it must be 1, 2 or None")
        unknown = sorted(set(kwargs) - set(_HINTS))
        if unknown:
            raise InvalidInputError(f"{unknown[0]}: no such argument; known are {_HINTS}")
        self.block_size, self.causal, self.seq_dim = block_size, causal, seq_dim
        self.block_m = block_m or (max(block_size, 64) if causal else block_size)
        self.block_n = block_n or block_size
        check(
            causal or max(self.block_m, self.block_n) <= block_size,
            f"block_m={block_m}, block_n={block_n}: not causal, neither may be over {block_size}",
        )
        check(
            block_size % self.block_n == 0,
            f"block_n={block_n}: it must divide the block size {block_size}",
        )
        self.kwargs = kwargs
        self._masks: dict[tuple[Any, ...], Mask] = {}

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        sm_scale: float | None = None,
        *,
        cu_seqlen_k: Tensor | None = None,
        cu_seqlen_q: Tensor | None = None,
        left_paddings: Tensor | None = None,
        seqlens: Tensor | None = None,
        return_lse: bool = False,
        split_qkv: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    ) -> Any:  # noqa: ANN401 - Tensor, or two
        """Compute attention.

        Parameters
        ----------
        q : Tensor, [B, Lq, Hq, D], [B, Hq, Lq, D] with ``seq_dim=2``, or [total, Hq, D]
        k, v : Tensor, likewise with Lkv and Hkv
            Without v, `split_qkv` takes them out of k; without k too, all three out of q.
        sm_scale : float, default 1 / sqrt(D), also for 0
        cu_seqlen_k, cu_seqlen_q : Tensor, [B + 1], int32 or int64
            Of 3-D tensors. Without `cu_seqlen_q`, one query a sequence or as many as keys.
        left_paddings, seqlens : Tensor, [B], optional
            Of 4-D tensors: keys before the first real one, and real keys (default: all that
            follow). With as many queries as keys, queries are padded likewise; with fewer, they are
            the last of each sequence.
        return_lse : bool
            Return the LSE too, fp32 [B, Hq, Lq] or [Hq, total], differentiable.

        Returns
        -------
        Tensor, as q, or (out, lse)
            Rows that are padding, or see nothing, are 0.

        Raises
        ------
        CheckFailedError, ValueError
            As the original's.
        """
        q, k, v = _unpacked(q, k, v, split_qkv)
        arguments: dict[str, Any] = {"scale": sm_scale or None, "return_lse": return_lse}
        if q.dim() == 3:
            past = self._packed(q, k, cu_seqlen_q, cu_seqlen_k, arguments)
        else:
            past = self._padded(q, k, left_paddings, seqlens, arguments)
        head_dim = 1 if q.dim() == 3 or self.seq_dim == 2 else 2
        heads = (q.shape[head_dim], k.shape[head_dim])
        arguments["mask"] = self._mask(heads, past, q.device)
        out = self.kwargs.get("out")
        if out is not None and not (torch.is_grad_enabled() and any(map(_wants, (q, k, v)))):
            arguments["out"] = out
        return attention(q, k, v, **arguments)

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        cu_seqlen_q: Tensor | None,
        cu_seqlen_k: Tensor | None,
        arguments: dict[str, Any],
    ) -> int | None:
        if cu_seqlen_k is None:
            raise CheckFailedError("cu_seqlen_k is None: 3-D tensors need it")
        arguments["kv_seqs"] = keys = Ragged.from_cu_seqlens(cu_seqlen_k)
        batch = len(cu_seqlen_k) - 1
        if cu_seqlen_q is not None:
            arguments["q_seqs"] = Ragged.from_cu_seqlens(cu_seqlen_q)
        elif len(q) == batch:
            row = torch.arange(batch, dtype=cu_seqlen_k.dtype, device=q.device)
            arguments["q_seqs"] = Ragged(row, torch.ones_like(row), 1)
        elif len(q) == len(k):
            arguments["q_seqs"] = keys
        else:
            raise InvalidInputError(
                f"q has {len(q)} rows: without cu_seqlen_q it must have one for each of the "
                f"{batch} sequences, or as many as k, {len(k)}"
            )
        return None

    def _padded(
        self,
        q: Tensor,
        k: Tensor,
        left_paddings: Tensor | None,
        seqlens: Tensor | None,
        arguments: dict[str, Any],
    ) -> int | None:
        """Return how many keys there are before the first query, where that is known."""
        seq_dim = self.seq_dim or 1
        len_q, len_kv = q.shape[seq_dim], k.shape[seq_dim]
        arguments["layout"] = "bshd" if seq_dim == 1 else "bhsd"
        check(
            len_kv <= self.max_seqlen,
            f"k has {len_kv} tokens: the pattern has room for {self.max_seqlen}",
        )
        if left_paddings is None and seqlens is None:
            return len_kv - len_q
        left = None if left_paddings is None else left_paddings.to(q.device)
        if seqlens is not None:
            length = seqlens.to(q.device)
            left = None if left is None else left.to(length.dtype)
        elif left is not None:
            length = len_kv - left
        arguments["kv_seqs"] = Padded(length, left)
        if len_q == len_kv:
            arguments["q_seqs"] = arguments["kv_seqs"]
        return None

    def _mask(self, heads: tuple[int, int], past: int | None, device: torch.device) -> Mask:
        """Return the mask of a call; `past` is None where sequences differ."""
        pattern = self.get_buffer("sparse_pattern")
        if pattern.device != device:
            self.sparse_pattern = pattern = pattern.to(device)
        check(
            len(pattern) in (1, *heads),
            f"the pattern has {len(pattern)} heads: q has {heads[0]} and k {heads[1]}",
        )
        return self._of_blocks(pattern, past)

    def _of_blocks(self, pattern: Tensor, past: int | None) -> Mask:
        """Return the mask of a pattern, the same value as long as the pattern is the same."""
        before = 0
        if pattern.shape[1] < pattern.shape[2]:  # of the last queries
            if past is None:
                raise CheckFailedError(
                    "a pattern with fewer rows than columns: queries must have one length, 4-D and "
                    "unpadded"
                )
            check(
                past % self.block_size == 0,
                f"{past} keys before the first query: with fewer rows than columns in the pattern, "
                f"that must be a multiple of the block size {self.block_size}",
            )
            before = past // self.block_size
        key = (pattern.data_ptr(), pattern._version, tuple(pattern.shape), pattern.device, before)
        found = self._masks.get(key)
        if found is None:
            factor = max(1, self.block_size // _LARGEST_BLOCK)
            whole = torch.nn.functional.pad(pattern, (0, 0, before, 0))
            if factor > 1:
                whole = whole.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            found = BlockSparse(whole, self.block_size // factor, causal=self.causal)
            self._masks = {key: found}
        return found


class LocalStrideSparseAttention(SparseAttention):
    """Attention to the blocks nearby, and to every so many-th of the others (phi-3-small).

    The pattern is computed where it is needed, not stored, where its heads are those of the tensors
    and blocks are of 128 or fewer; `sparse_pattern` writes it out.

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
        check(vert_stride >= 1, f"vert_stride={vert_stride}: it must be at least 1, which is dense")
        sizes = local_blocks if isinstance(local_blocks, tuple) else (local_blocks,)
        check(
            vert_stride == 1 or not causal or min(sizes) >= 1,
            f"local_blocks={local_blocks}: it must be at least 1",
        )
        check(
            active_head_range is None or len(active_head_range) == 2,
            f"active_head_range={active_head_range!r}: it must be (first, after the last)",
        )
        self.max_seq_len = multiple_of(max_seq_len, max(block_size, block_m or 1, block_n or 1, 64))
        self.max_seqlen = self.max_seq_len
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.local_blocks, self.vert_stride = local_blocks, vert_stride
        self.homo_head, self.num_dense_heads = homo_head, num_dense_heads
        self.head_sliding_offset = head_sliding_offset
        self.active_head_range = None if homo_head else active_head_range
        self._patterns: dict[torch.device, Tensor] = {}
        self._written(1)  # refuses what is no pattern

    @property
    def sparse_pattern(self) -> Tensor:  # type: ignore[override]
        """The pattern, [heads, blocks, blocks], bool: written out when it is first asked for."""
        return self._pattern_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def _written(self, num_blocks: int, device: torch.device | None = None) -> Tensor:
        _, mask, _ = get_sparse_attn_mask(
            self.num_heads,
            num_blocks * self.block_size,
            self.block_size,
            self.local_blocks,
            self.vert_stride,
            self.homo_head,
            self.num_kv_heads,
            dtype=torch.bool,
            device="cpu" if device is None else device,
            head_sliding_offset=self.head_sliding_offset,
            num_dense_heads=self.num_dense_heads,
            causal=self.causal,
        )
        if self.active_head_range is not None and len(mask) > 1:
            mask = mask[slice(*self.active_head_range)]
        return mask

    def _pattern_on(self, device: torch.device) -> Tensor:
        if device not in self._patterns:
            self._patterns[device] = self._written(self.max_seqlen // self.block_size, device)
        return self._patterns[device]

    def _mask(self, heads: tuple[int, int], past: int | None, device: torch.device) -> Mask:
        found = self._masks.get(heads)
        if found is not None:
            return found
        rule = self._closed_form(heads)
        if rule is None:
            pattern = self._pattern_on(device)
            check(
                len(pattern) in (1, *heads),
                f"the pattern has {len(pattern)} heads: q has {heads[0]} and k {heads[1]}",
            )
            return self._of_blocks(pattern, past)
        self._masks[heads] = rule
        return rule

    def _closed_form(self, heads: tuple[int, int]) -> LocalStride | None:
        """Return the pattern as a rule of positions, if it is one of these heads."""
        sizes = self.local_blocks if isinstance(self.local_blocks, tuple) else (self.local_blocks,)
        if self.block_size > _LARGEST_BLOCK or min(sizes) < 1:
            return None
        if self.homo_head:
            # The original takes the one head for head 0 of one.
            return LocalStride(
                self.block_size,
                self.local_blocks,
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
            self.local_blocks,
            self.vert_stride,
            head_step=step,
            head_offset=(first // group * step + self.head_sliding_offset) % self.vert_stride,
            num_dense_heads=dense,
            causal=self.causal,
        )


def combine_attn_partitions(*x: tuple[Tensor, Tensor], hdim: int = 1) -> Tensor:
    """Combine results for the same queries and disjoint sets of keys; differentiable.

    Parameters
    ----------
    x : (Tensor, Tensor)
        Results and LSEs [B, H, Lq] of the parts.
    hdim : 1 or 2
        Which dimension of the results is the heads: both are right here.

    Returns
    -------
    Tensor, as the results
        0 where no part saw anything.
    """
    check(hdim in (1, 2), f"hdim={hdim}: it must be 1 ([B, H, L, D]) or 2 ([B, L, H, D])")
    outs, lses = zip(*x, strict=True)
    return merge(outs, lses, layout="bhsd" if hdim == 1 else "bshd")[0]


def _unpacked(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    split_qkv: Callable[[Tensor], tuple[Tensor, ...]] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if k is not None and v is not None:
        return q, k, v
    if split_qkv is None:
        raise CheckFailedError("k or v is None: split_qkv must say how to take them apart")
    if k is None:
        q, k, v = split_qkv(q)
    else:
        k, v = split_qkv(k)
    return q, k, v


def _wants(x: Tensor) -> bool:
    return x.requires_grad

"""The module for any pattern, over `jitattn.attention`."""

from __future__ import annotations

import numbers
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.api.attention import attention
from jitattn.compat._errors import CheckFailedError, check
from jitattn.compat.dkernel._checks import check_indices, check_shapes
from jitattn.compat.dkernel._kept import KeptMasks
from jitattn.compat.dkernel._sequences import Placed, packed, padded
from jitattn.compat.dkernel.utils import is_kv_cache_efficient, verify_sparse_pattern
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.request.outputs import check_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.values.masks import Mask

_HINTS: Final = ("out", "d_splits", "inference")


class SparseAttention(torch.nn.Module):
    """Attention by any pattern of blocks; differentiable in every mode.

    Parameters
    ----------
    block_size : int
        A power of two from 16: queries and keys of a block.
    sparse_pattern : Tensor, [rows, columns] or [heads, rows, columns]
        Nonzero = attend. One for all heads, one for each kv head or for each query head. A square
        pattern counts rows by the positions of queries among the keys, of which the last query is
        at the last one; not causal and with more queries than keys, from query 0. Any other is of
        the queries of a call, the first of which is at the top; but one query alone has the row of
        its position, if there are several. Where a causal one of those has queries after a number
        of keys that is no multiple of the block size, a call computes twice, and takes its rows
        from both.
    causal : bool
        Let no query see keys after its own position, within blocks too.
    seq_dim : 1 or 2, optional
        Which dimension of 4-D inputs is the sequence; None is 1.
    block_m, block_n : int, optional
        Hints, checked and otherwise ignored. So are `d_splits` and `inference`.
    out : Tensor, optional
        Where to write the result of calls without gradients.

    Notes
    -----
    Under torch.compile, blocks over 128 and patterns that must be moved are made by the first call,
    and the second is traced anew with them: one call before it spares that. A compiled call takes
    them as they were; written to, other patterns count at once. Contents of tensors of indices are
    not checked in a graph.

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
        with torch.inference_mode(False):  # a tensor whose writes are counted: none is compared
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
            is_size = type(size) is int and size >= 16 and size & (size - 1) == 0
            is_fine = is_size or (size is None and name != "block_size")
            check(is_fine, f"{name}={size!r}: it must be a power of two from 16")
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
        self._kept = KeptMasks(block_size, causal)

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
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
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
        max_seqlen_q, max_seqlen_k : int, optional
            Bounds on the lengths of packed sequences, which save work where they are on a GPU: it
            is not waited for them, and without bounds they may be as long as the pattern and the
            tensors. What is beyond a bound is not seen.

        Returns
        -------
        Tensor, as q, or (out, lse)
            Rows that are padding, or see nothing, are 0.

        Raises
        ------
        CheckFailedError
            What the original asserts: shapes that do not fit together, a sequence that the pattern
            has no room for, paddings beyond the end of k. Contents of tensors of indices on a GPU
            are not waited for, and so not checked: what lies beyond the end is left out, and
            queries beyond the rows of the pattern see nothing.
        InvalidInputError
            Anything else that breaks a rule; it is a `ValueError`.
        """
        q, k, v = _unpacked(q, k, v, split_qkv)
        check_shapes(q, k, v, self.seq_dim)
        where = (cu_seqlen_k, cu_seqlen_q, left_paddings, seqlens)
        if q.dim() == 3 or not (cu_seqlen_k is cu_seqlen_q is left_paddings is seqlens is None):
            check_indices(where, q)
        if not (sm_scale is None or isinstance(sm_scale, numbers.Real)):
            raise InvalidInputError(
                f"sm_scale is a {type(sm_scale).__name__}: it must be a number; pass a float, or "
                "leave it out for 1 / sqrt(head dim)"
            )
        arguments: dict[str, Any] = {"scale": sm_scale or None, "return_lse": return_lse}
        shift, placed = 0, None
        if q.dim() == 3:
            longest = (max_seqlen_q, max_seqlen_k)
            placed = packed(q, k, cu_seqlen_q, cu_seqlen_k, longest, self.max_seqlen)
        else:
            if not max_seqlen_q is max_seqlen_k is None:
                raise CheckFailedError(
                    "max_seqlen_q or max_seqlen_k is given and q is 4-D: they go with 3-D tensors; "
                    "lengths of 4-D ones are in seqlens"
                )
            arguments["layout"] = "bhsd" if self.seq_dim == 2 else "bshd"
            shift, placed = self._placed(q, k, left_paddings, seqlens)
        if placed is not None:
            arguments["q_seqs"], arguments["kv_seqs"], longest_kv, tile_rows = placed
            arguments["tile_rows"] = tile_rows
            if longest_kv is not None:
                self._check_positions(longest_kv)
        head_dim = 1 if q.dim() == 3 or self.seq_dim == 2 else 2
        masks = self._masks_of((q.shape[head_dim], k.shape[head_dim]), shift, q.device)
        out = self.kwargs.get("out")
        if out is not None and torch.is_grad_enabled() and any(map(_wants, (q, k, v))):
            out = None
        has_padding = q.dim() == 4 and placed is not None and placed.q_seqs is not None
        if out is not None and (len(masks) > 1 or has_padding):
            if torch.compiler.is_compiling():
                raise UnsupportedError("out is given under torch.compile: make the module without")
            check_out(out, (q, k, v), (*q.shape[:-1], v.shape[-1]), q.dtype)
            out.zero_()  # attention leaves rows of the caller's room that are padding as they are
        if len(masks) == 1:
            return attention(q, k, v, mask=masks[0], out=out, **arguments)
        both = [attention(q, k, v, mask=mask, **arguments) for mask in masks]
        return self._joined(both, shift % self.block_size, return_lse, out)

    def _placed(
        self,
        q: Tensor,
        k: Tensor,
        left_paddings: Tensor | None,
        seqlens: Tensor | None,
    ) -> tuple[int, Placed | None]:
        """Return by how many tokens positions are ahead of rows, and where sequences lie."""
        seq_dim = self.seq_dim or 1
        len_q, len_kv = q.shape[seq_dim], k.shape[seq_dim]
        if len_kv > self.max_seqlen:
            raise CheckFailedError(
                f"k has {len_kv} tokens: the pattern has room for {self.max_seqlen}"
            )
        if left_paddings is None and seqlens is None:
            return len_kv - len_q - self._first_row(len_q, len_kv), None
        return 0, padded(len_q, len_kv, left_paddings, seqlens, q.device)

    @property
    def _size(self) -> tuple[int, int]:
        """Rows and columns of the pattern."""
        pattern: Tensor = self._buffers["sparse_pattern"]  # type: ignore[assignment]
        rows, columns = pattern.shape[1:]
        return rows, columns

    def _first_row(self, len_q: int, len_kv: int) -> int:
        """Return where query 0 is among the rows of the pattern, in tokens."""
        rows, columns = self._size
        past = len_kv - len_q
        if rows == columns:
            # What is before the first key sees nothing if causal; else it is no position at all.
            first = past if self.causal or past >= 0 else 0
        elif len_q == 1 and rows > 1:
            first = max(0, past)  # as the original has it
        else:
            first = 0
        if first + len_q > rows * self.block_size:
            raise CheckFailedError(
                f"q has {len_q} tokens and k {len_kv}: queries begin at row "
                f"{first // self.block_size} of the pattern, which has {rows} rows of "
                f"{self.block_size} tokens; give it a row for every block of queries"
            )
        return first

    def _check_positions(self, len_kv: int) -> None:
        """Refuse a pattern without rows for all positions: paddings and packing count by them."""
        rows, columns = self._size
        if rows < columns and len_kv > rows * self.block_size:
            raise CheckFailedError(
                f"sequences of up to {len_kv} tokens, padded or packed: rows of the pattern count "
                f"by positions there, and it has {rows} of {self.block_size} tokens; give it as "
                "many rows as columns"
            )

    def _masks_of(self, heads: tuple[int, int], shift: int, device: torch.device) -> list[Mask]:
        """Return the mask of a call, or two of which each query takes one (see `_joined`)."""
        pattern = self._pattern_on(device)
        if pattern.shape[0] not in (1, *heads):
            raise CheckFailedError(
                f"the pattern has {len(pattern)} heads: q has {heads[0]} and k {heads[1]}"
            )
        if shift == 0:
            return [self._kept.mask(pattern)]
        if not self.causal:
            return [self._kept.mask(pattern, first_row=0)]
        moved, rest = shift // self.block_size, shift % self.block_size
        return [self._kept.mask(pattern, moved + i) for i in range(1 if rest == 0 else 2)]

    def _pattern_on(self, device: torch.device) -> Tensor:
        pattern: Tensor = self._buffers["sparse_pattern"]  # type: ignore[assignment]
        if pattern.device != device:
            with torch.inference_mode(False):
                self.sparse_pattern = pattern = pattern.to(device)
        return pattern

    def _joined(self, both: list[Any], rest: int, return_lse: bool, out: Tensor | None) -> Any:  # noqa: ANN401
        """Return for each query the result that its row is right in.

        Causal, with rows that count from query 0 and `rest` more keys before it than whole blocks:
        a block of queries lies in two blocks of positions. Its first queries take the result of
        the pattern moved by whole blocks, its last ones that of one row more.
        """
        seq_dim = self.seq_dim or 1
        values = [result[0] if return_lse else result for result in both]
        number = torch.arange(values[0].shape[seq_dim], device=values[0].device)
        is_early = number % self.block_size < self.block_size - rest
        rows = is_early[:, None, None] if seq_dim == 1 else is_early[:, None]
        result = torch.where(rows, *values) if out is None else torch.where(rows, *values, out=out)
        return (result, torch.where(is_early, both[0][1], both[1][1])) if return_lse else result


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

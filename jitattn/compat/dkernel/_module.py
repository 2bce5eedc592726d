"""The module for any pattern, over `jitattn.attention`."""

from __future__ import annotations

import numbers
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.compat._core import attention
from jitattn.compat._errors import CheckFailedError, check
from jitattn.compat.dkernel._checks import check_shapes
from jitattn.compat.dkernel._kept import KeptMasks
from jitattn.compat.dkernel._sequences import Sizes, bounds_of_a_batch, placed
from jitattn.compat.dkernel.utils import is_kv_cache_efficient, verify_sparse_pattern
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.request.outputs import check_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.values.masks import Mask
    from jitattn.values.sequences import Padded, Ragged

_HINTS: Final = ("out", "d_splits", "inference")
#: Most call shapes that a module caches.
_MOST_FACTS: Final = 256


class KnownMasks:
    """The masks of a pattern for as long as it is unchanged; a copied module makes its own."""

    __slots__ = ("masks", "pattern", "version")

    def __init__(self, pattern: Tensor, version: int, masks: list[Mask]) -> None:
        self.pattern, self.version, self.masks = pattern, version, masks

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


@dataclass(slots=True)
class Facts:
    """Facts that follow from the shapes of a call."""

    sizes: Sizes
    layout: str
    most_positions: int | None  #: tokens of its rows, where a pattern has fewer rows than columns
    shift: int  #: tokens by which positions are ahead of pattern rows
    rules: list[Mask] | None  #: the masks, if they are in closed form
    known: KnownMasks | None = None  #: otherwise those of the pattern, from the first call on


class SparseAttention(torch.nn.Module):
    """Attention with any block-sparse pattern; differentiable in every mode.

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
        self._facts: dict[tuple[object, ...], Facts] = {}
        self._facts_are_of: Tensor | None = None

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
        if k is None or v is None:
            q, k, v = _unpacked(q, k, v, split_qkv)
        is_batch = cu_seqlen_k is cu_seqlen_q is left_paddings is seqlens is None
        facts = self._facts_of(q, k, v, is_batch)
        if not (sm_scale is None or type(sm_scale) is float or isinstance(sm_scale, numbers.Real)):
            raise InvalidInputError(
                f"sm_scale is a {type(sm_scale).__name__}: it must be a number; pass a float, or "
                "leave it out for 1 / sqrt(head dim)"
            )
        q_seqs: Ragged | Padded | None = None
        kv_seqs: Ragged | Padded | None = None
        tile_rows, has_padding = None, False
        if facts.sizes.is_packed or not is_batch:
            where = (cu_seqlen_k, cu_seqlen_q, left_paddings, seqlens)
            longest = (max_seqlen_q, max_seqlen_k)
            q_seqs, kv_seqs, longest_kv, tile_rows = placed(facts.sizes, where, longest, q)
            has_padding = q_seqs is not None and not facts.sizes.is_packed
            if longest_kv is not None and facts.most_positions is not None:
                self._check_positions(longest_kv, facts.most_positions)
        elif not max_seqlen_q is max_seqlen_k is None:
            raise bounds_of_a_batch()
        masks = facts.rules
        if masks is None:
            known = facts.known
            if known is None:
                masks = self._masks_of(facts, q.device)
            elif known.pattern._version != known.version:
                self._facts.clear()  # with the masks of the old pattern, for every shape
                masks = self._masks_of(facts, q.device)
            else:
                masks = known.masks
        out = self.kwargs.get("out")
        if out is not None and torch.is_grad_enabled() and any(map(_wants, (q, k, v))):
            out = None
        if out is not None and (len(masks) > 1 or has_padding):
            if torch.compiler.is_compiling():
                raise UnsupportedError("out is given under torch.compile: make the module without")
            check_out(out, (q, k, v), (*q.shape[:-1], v.shape[-1]), q.dtype)
            out.zero_()  # attention does not write the padding rows of `out`
        scale, layout = sm_scale or None, facts.layout
        if len(masks) == 1:
            return attention(
                q,
                k,
                v,
                mask=masks[0],
                scale=scale,
                layout=layout,
                out=out,
                return_lse=return_lse,
                q_seqs=q_seqs,
                kv_seqs=kv_seqs,
                tile_rows=tile_rows,
            )
        # Such a pattern counts from query 0: the call is a batch that fills its tensors.
        both = [
            attention(q, k, v, mask=mask, scale=scale, layout=layout, return_lse=return_lse)
            for mask in masks
        ]
        return self._joined(both, facts.shift % self.block_size, return_lse, out)

    def _facts_of(self, q: Tensor, k: Tensor, v: Tensor, is_batch: bool) -> Facts:
        """Check the shapes of a call, and return the facts that follow from them, cached by shape.

        Raises
        ------
        CheckFailedError, InvalidInputError
        """
        if torch.compiler.is_compiling():  # shapes may be symbols
            return self._checked_facts(q, k, v, is_batch)
        pattern = self._buffers.get("sparse_pattern")
        if pattern is not self._facts_are_of:
            self._facts.clear()
            self._facts_are_of = pattern
        key: tuple[object, ...]
        try:
            key = (
                type(q), type(k), type(v), q.shape, k.shape, v.shape, is_batch,
                self.seq_dim, self.max_seqlen, q.device,
            )  # fmt: skip
            known = self._facts.get(key)
        except (
            AttributeError,
            RuntimeError,
            TypeError,
        ):  # not tensors, nested ones, or symbolic sizes
            return self._checked_facts(q, k, v, is_batch)
        if known is None:
            if len(self._facts) >= _MOST_FACTS:
                self._facts.clear()
            known = self._facts[key] = self._checked_facts(q, k, v, is_batch)
        return known

    def _checked_facts(self, q: Tensor, k: Tensor, v: Tensor, is_batch: bool) -> Facts:
        check_shapes(q, k, v, self.seq_dim)
        rows, columns = self._size
        most = rows * self.block_size if rows < columns else None
        if q.dim() == 3:
            lengths, heads = (q.shape[0], k.shape[0]), (q.shape[1], k.shape[1])
            sizes = Sizes(True, 0, *lengths, *heads, self.max_seqlen, q.device)
            return Facts(sizes, "bshd", most, 0, self._rules_of(heads, 0))
        seq_dim = self.seq_dim or 1
        heads = (q.shape[3 - seq_dim], k.shape[3 - seq_dim])
        len_q, len_kv = q.shape[seq_dim], k.shape[seq_dim]
        if len_kv > self.max_seqlen:
            raise CheckFailedError(
                f"k has {len_kv} tokens: the pattern has room for {self.max_seqlen}"
            )
        shift = len_kv - len_q - self._first_row(len_q, len_kv) if is_batch else 0
        layout = "bhsd" if seq_dim == 2 else "bshd"
        sizes = Sizes(False, q.shape[0], len_q, len_kv, *heads, self.max_seqlen, q.device)
        return Facts(sizes, layout, most, shift, self._rules_of(heads, shift))

    @property
    def _size(self) -> tuple[int, int]:
        """Return the rows and columns of the pattern."""
        pattern: Tensor = self._buffers["sparse_pattern"]  # type: ignore[assignment]
        rows, columns = pattern.shape[1:]
        return rows, columns

    def _first_row(self, len_q: int, len_kv: int) -> int:
        """Return the token position of query 0 in the rows of the pattern."""
        rows, columns = self._size
        past = len_kv - len_q
        if rows == columns:
            # Positions before the first key see nothing if causal; else they do not exist.
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

    def _check_positions(self, longest: int, most: int) -> None:
        """Refuse a pattern without a row for every position, which paddings and packing require."""
        if longest > most:
            raise CheckFailedError(
                f"sequences of up to {longest} tokens, padded or packed: rows of the pattern count "
                f"by positions there, and it has {most // self.block_size} of {self.block_size} "
                "tokens; give it as many rows as columns"
            )

    def _rules_of(self, heads: tuple[int, int], shift: int) -> list[Mask] | None:
        """Return the mask if it is in closed form; None if it needs the pattern."""
        return None

    def _masks_of(self, facts: Facts, device: torch.device) -> list[Mask]:
        """Return the mask of a call, or two masks that divide the queries (see `_joined`)."""
        pattern, shift = self._pattern_on(device), facts.shift
        count, heads = pattern.size(0), (facts.sizes.heads_q, facts.sizes.heads_kv)
        if count != 1 and count not in heads:
            raise CheckFailedError(
                f"the pattern has {count} heads: q has {heads[0]} and k {heads[1]}"
            )
        in_graph = torch.compiler.is_compiling()
        version = None if in_graph or pattern.is_inference() else pattern._version
        masks: list[Mask]
        if shift == 0:
            masks = [self._kept.mask(pattern)]
        elif not self.causal:
            masks = [self._kept.mask(pattern, first_row=0)]
        else:
            moved, rest = shift // self.block_size, shift % self.block_size
            masks = [self._kept.mask(pattern, moved + i) for i in range(1 if rest == 0 else 2)]
        if version is not None:
            facts.known = KnownMasks(pattern, version, masks)
        return masks

    def _pattern_on(self, device: torch.device) -> Tensor:
        pattern: Tensor = self._buffers["sparse_pattern"]  # type: ignore[assignment]
        if pattern.device != device:
            with torch.inference_mode(False):
                self.sparse_pattern = pattern = pattern.to(device)
        return pattern

    def _joined(self, both: list[Any], rest: int, return_lse: bool, out: Tensor | None) -> Any:  # noqa: ANN401
        """Select for each query the result of the mask that applies to its row.

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

"""Ulysses: a rank's rows of all heads become all rows of its heads, and back (arXiv:2309.14509).

Heads need not divide evenly. A rank has the kv heads that its query heads read; where there are
fewer kv heads than ranks, several ranks have the same one, and its gradients are summed.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from jitattn.distributed.segments import count_of, place_in, together
from jitattn.distributed.transfers import post

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from jitattn.distributed.segments import Segments


class HeadRange(NamedTuple):
    """Query heads of a rank, and the kv heads that they read."""

    first: int
    stop: int
    first_kv: int
    stop_kv: int

    @property
    def size(self) -> int:
        """Number of query heads."""
        return self.stop - self.first


@functools.lru_cache(256)
def head_ranges(heads_q: int, heads_kv: int, ranks: int) -> tuple[HeadRange, ...]:
    """Return the heads of every rank: whole groups of a kv head, if there are enough."""
    group = heads_q // heads_kv
    unit = group if heads_kv >= ranks else 1
    ends = [heads_q // unit * idx // ranks * unit for idx in range(ranks + 1)]
    return tuple(
        HeadRange(first, stop, first // group, (stop - 1) // group + 1)
        for first, stop in itertools.pairwise(ends)
    )


def read_heads(own: HeadRange, group: int) -> tuple[int, ...] | None:
    """Return which of a rank's kv heads each of its query heads reads; None: as GQA counts."""
    reads = tuple(head // group - own.first_kv for head in range(own.first, own.stop))
    num_kv = own.stop_kv - own.first_kv
    if own.size % num_kv == 0:
        per_head = own.size // num_kv
        if reads == tuple(idx // per_head for idx in range(own.size)):
            return None
    return reads


class Exchange(NamedTuple):
    """An exchange of rows for heads, without its tensors."""

    group: ProcessGroup
    rank: int
    rows: tuple[Segments, ...]  #: of every rank
    heads: tuple[tuple[int, int], ...]  #: of every rank: first, stop

    @property
    def inverse_sums(self) -> bool:
        """Whether some heads belong to several ranks."""
        ends = sorted(self.heads)
        return any(one[1] > other[0] for one, other in itertools.pairwise(ends))


def to_heads(tensors: Sequence[Tensor], exchanges: Sequence[Exchange]) -> list[Tensor]:
    """Exchange this rank's rows of all heads for all ranks' rows of its heads.

    Parameters
    ----------
    tensors : sequence of Tensor, [B, rows, H, D] each
    exchanges : sequence of Exchange
        One for each; they differ in heads only.

    Returns
    -------
    list of Tensor, [B, all rows, own heads, D]
        Rows in the order of `together`.
    """
    found = _ToHeads.apply(tuple(exchanges), *tensors)  # type: ignore[no-untyped-call]
    return list(found)


def to_rows(tensors: Sequence[Tensor], exchanges: Sequence[Exchange]) -> list[Tensor]:
    """Exchange all ranks' rows of this rank's heads for its rows of all heads, as `to_heads`."""
    found = _ToRows.apply(tuple(exchanges), *tensors)  # type: ignore[no-untyped-call]
    return list(found)


class _ToHeads(Function):
    @staticmethod
    def forward(ctx: Any, exchanges: tuple[Exchange, ...], *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.exchanges = exchanges
        return _to_heads(tensors, exchanges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ANN401
        return None, *_to_rows(gradients, ctx.exchanges)


class _ToRows(Function):
    @staticmethod
    def forward(ctx: Any, exchanges: tuple[Exchange, ...], *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.exchanges = exchanges
        return _to_rows(tensors, exchanges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ANN401
        return None, *_to_heads(gradients, ctx.exchanges)


def _to_heads(tensors: Sequence[Tensor], exchanges: Sequence[Exchange]) -> tuple[Tensor, ...]:
    sends, receives, arriving = [], [], []
    for x, one in zip(tensors, exchanges, strict=True):
        first, stop = one.heads[one.rank]
        parts = []
        for rank, rows in enumerate(one.rows):
            if rank == one.rank:
                parts.append(x[:, :, first:stop])
                continue
            parts.append(x.new_empty(x.shape[0], count_of(rows), stop - first, x.shape[3]))
            sends.append((rank, x[:, :, slice(*one.heads[rank])].contiguous()))
            receives.append((rank, parts[-1]))
        arriving.append(parts)
    if exchanges:
        post(exchanges[0].group, sends, receives).wait()
    found = []
    for parts, one in zip(arriving, exchanges, strict=True):
        whole = together(one.rows)
        x = parts[one.rank]
        out = x.new_empty(x.shape[0], count_of(whole), *x.shape[2:])
        for part, rows in zip(parts, one.rows, strict=True):
            first = 0
            for segment in rows:
                place = place_in(segment, whole)
                out[:, place.rows] = part[:, first : first + segment.size]
                first += segment.size
        found.append(out)
    return tuple(found)


def _to_rows(tensors: Sequence[Tensor], exchanges: Sequence[Exchange]) -> tuple[Tensor, ...]:
    sends, receives, arriving = [], [], []
    for x, one in zip(tensors, exchanges, strict=True):
        whole = together(one.rows)
        own_rows = count_of(one.rows[one.rank])
        parts = []
        for rank, rows in enumerate(one.rows):
            places = [place_in(segment, whole) for segment in rows]
            part = torch.cat([x[:, place.rows] for place in places] or [x[:, :0]], dim=1)
            if rank == one.rank:
                parts.append(part)
                continue
            first, stop = one.heads[rank]
            parts.append(x.new_empty(x.shape[0], own_rows, stop - first, x.shape[3]))
            sends.append((rank, part.contiguous()))
            receives.append((rank, parts[-1]))
        arriving.append(parts)
    if exchanges:
        post(exchanges[0].group, sends, receives).wait()
    return tuple(_summed(parts, one) for parts, one in zip(arriving, exchanges, strict=True))


def _summed(parts: Sequence[Tensor], one: Exchange) -> Tensor:
    """Put the heads of all ranks together; sum those of several, in fp32, in the ranks' order."""
    x = parts[one.rank]
    num_heads = max(stop for _, stop in one.heads)
    shape = (x.shape[0], x.shape[1], num_heads, x.shape[3])
    if not one.inverse_sums:
        out = x.new_zeros(shape)
        for part, (first, stop) in zip(parts, one.heads, strict=True):
            out[:, :, first:stop] = part
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(shape, dtype=wide)
    for part, (first, stop) in zip(parts, one.heads, strict=True):
        out[:, :, first:stop] += part
    return out.to(x.dtype)

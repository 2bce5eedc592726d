"""Plans of how ranks share a sequence: `plan`, `shard`, `unshard`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from jitattn.distributed import balance
from jitattn.distributed.members import members_of, rank_of, size_of
from jitattn.distributed.options import packed_spans, split_mask
from jitattn.distributed.pieces import Span
from jitattn.distributed.segments import (
    contiguous,
    count_of,
    cuts,
    place_in,
    striped,
    zigzag,
)
from jitattn.distributed.transfers import post
from jitattn.errors import InvalidInputError
from jitattn.values.frozen import Frozen
from jitattn.values.given import integer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from jitattn.distributed.members import Members
    from jitattn.distributed.segments import Segments
    from jitattn.values.masks import Mask
    from jitattn.values.sequences import Ragged

Layout: TypeAlias = Literal["auto", "contiguous", "zigzag", "striped"]
_LAYOUTS: Final = get_args(Layout)


class Plan(Frozen):
    """How the ranks of a group share a sequence; made by `plan`, alike on every rank.

    Attributes
    ----------
    length : int
        Positions of the whole sequence; of packed sequences, rows of all.
    layout : str
        "contiguous", "zigzag", "striped", or "balanced" (chunks by cost).
    segments : tuple
        For every rank, the runs (start, count, step) of positions that it holds, in order.
    rank : int
        This rank's number.
    spans : tuple
        Packed sequences, or none.
    """

    __slots__ = ("_members", "layout", "length", "rank", "segments", "spans")

    length: int
    layout: str
    segments: tuple[Segments, ...]
    rank: int
    spans: tuple[Span, ...]
    _members: Members | None

    def __init__(
        self,
        length: int,
        layout: str,
        segments: tuple[Segments, ...],
        members: Members,
        spans: tuple[Span, ...] = (),
    ) -> None:
        hold = object.__setattr__
        hold(self, "length", length)
        hold(self, "layout", layout)
        hold(self, "segments", segments)
        hold(self, "rank", members.rank)
        hold(self, "spans", spans)
        hold(self, "_members", members)

    def __getstate__(self) -> dict[str, Any]:
        """Return its fields; groups of ranks stay in their process."""
        return {**super().__getstate__(), "_members": None}

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.segments)

    @property
    def local_length(self) -> int:
        """Positions that this rank holds."""
        return count_of(self.segments[self.rank])

    @property
    def position_ids(self) -> Tensor:
        """Positions of this rank's rows, [local_length], int64, on the CPU.

        Rotary embeddings take them. Packed ones count in their own sequence; rows of no sequence
        count on from the sequence before.
        """
        own = self.segments[self.rank]
        runs = [torch.arange(one.start, one.stop, one.step, device="cpu") for one in own]
        found = torch.cat(runs) if runs else torch.arange(0, device="cpu")
        if self.spans:
            begins = sorted(one.q_start for one in self.spans if one.q_length)
            starts = torch.tensor(begins, device="cpu", dtype=torch.int64)
            if len(starts):
                idx = torch.searchsorted(starts, found, right=True) - 1
                found = found - torch.where(idx < 0, 0, starts[idx.clamp(min=0)])
        return found


def plan(
    mask: Mask,
    length: int,
    *,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    layout: Layout = "auto",
    seqs: Ragged | None = None,
) -> Plan:
    """Plan how ranks share a sequence, so that they have about the same work.

    Without communication; all ranks must ask for the same.

    Parameters
    ----------
    mask : Mask
        That of the attention to come.
    length : int, at least 1
        Positions of the whole sequence; it need not divide by the number of ranks.
    mesh : DeviceMesh, optional
        Of one dimension, or of two named ("ring", "ulysses").
    group : ProcessGroup, default the default group
    layout : "auto", "contiguous", "zigzag" or "striped"
        Contiguous: a run of positions each. Zigzag: one run from either end, so that causal work is
        even. Striped: every n-th position. Auto: contiguous if that is even within 5 % (25 % for
        windows, whose other layouts send more);
        else chunks, two for every rank, dealt out by the pairs that the mask lets their rows see
        (counted, or sampled where the mask is a function).
    seqs : Ragged, optional
        Packed sequences in the `length` rows, whose cost is tokens times the keys that they see.

    Returns
    -------
    Plan

    Raises
    ------
    InvalidInputError
        An argument breaks a rule.

    Examples
    --------
    >>> import jitattn
    >>> from jitattn.distributed import plan
    >>> plan(jitattn.Causal(), 4096).position_ids.shape
    torch.Size([4096])
    """
    number = integer(length)
    if number is None or number < 1:
        raise InvalidInputError(f"length={length!r}: it must be an int of at least 1")
    if layout not in _LAYOUTS:
        raise InvalidInputError(f"layout={layout!r}: it must be one of {', '.join(_LAYOUTS)}")
    members = members_of(mesh, group)
    size = members.size
    split_mask(mask)
    spans = () if seqs is None else packed_spans(seqs, seqs, (number, number))
    ends = cuts(number, size)
    whole = contiguous([stop - start for start, stop in itertools.pairwise(ends)])
    if layout == "contiguous":
        segments = whole
    elif layout == "striped":
        segments = striped(number, size)
    elif layout == "zigzag":
        segments = zigzag(number, size)
    else:
        layout_found, segments = balance.dealt(mask, number, size, whole, spans)
        return Plan(number, layout_found, segments, members, spans)
    return Plan(number, layout, segments, members, spans)


def shard(x: Tensor, plan: Plan, dim: int = 1) -> Tensor:
    """Return this rank's part of a tensor of the whole sequence; differentiable.

    Parameters
    ----------
    x : Tensor
        `plan.length` long in `dim`, the same on every rank.
    plan : Plan
    dim : int
        1 for [B, L, H, D], 2 for [B, H, L, D], 0 for packed sequences; -1 counts from the end.

    Returns
    -------
    Tensor, `plan.local_length` long in `dim`, contiguous

    Raises
    ------
    InvalidInputError
        `x` has another length.
    """
    _check(x, plan, dim, plan.length, "the whole sequence")
    own = plan.segments[plan.rank]
    if not own:
        return x.narrow(dim, 0, 0).contiguous()
    return torch.cat([_run(x, dim, one.start, one.size, one.step) for one in own], dim=dim)


def unshard(x: Tensor, plan: Plan, dim: int = 1) -> Tensor:
    """Return a tensor of the whole sequence from all ranks' parts of it, on every rank.

    Differentiable: of the gradient each rank takes its own rows, so all must compute the same of
    the result, as a loss of the whole sequence.

    Parameters
    ----------
    x : Tensor
        `plan.local_length` long in `dim`.
    plan : Plan
    dim : int
        As for `shard`.

    Returns
    -------
    Tensor, `plan.length` long in `dim`

    Raises
    ------
    InvalidInputError
        `x` has another length, or the plan comes from another process.
    CommunicationError
        A rank has gone, or did not take part.
    """
    _check(x, plan, dim, plan.local_length, "this rank's part")
    if plan._members is None:
        raise InvalidInputError("the plan was unpickled: make it here, with plan()")
    found: Tensor = _Unshard.apply(x, plan, dim % x.dim())  # type: ignore[no-untyped-call]
    return found


def _check(x: Tensor, plan: Plan, dim: int, length: int, what: str) -> None:
    if not -x.dim() <= dim < x.dim():
        raise InvalidInputError(f"dim={dim}: x has {x.dim()} dimensions")
    if x.shape[dim] != length:
        raise InvalidInputError(
            f"x has {x.shape[dim]} positions in dim {dim}: {what} has {length} by the plan (length "
            f"{plan.length}, rank {plan.rank} of {plan.ranks}); check dim"
        )


def _run(x: Tensor, dim: int, first: int, count: int, step: int) -> Tensor:
    """Return a run of positions, a view."""
    index: list[Any] = [slice(None)] * x.dim()
    index[dim] = slice(first, first + (count - 1) * step + 1, step)
    return x[tuple(index)]


class _Unshard(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, dim: int) -> Tensor:  # noqa: ANN401 - autograd's
        ctx.plan, ctx.dim = plan, dim
        return _gathered(x, plan, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        return shard(gradient, ctx.plan, ctx.dim), None, None


def _gathered(x: Tensor, plan: Plan, dim: int) -> Tensor:
    members = plan._members
    group = None if members is None else members.whole
    shape = list(x.shape)
    parts: list[Tensor] = []
    own = x.contiguous()
    for rank, segments in enumerate(plan.segments):
        shape[dim] = count_of(segments)
        parts.append(own if rank == plan.rank else x.new_empty(shape))
    if group is not None:
        ranks = _numbers_in(group, plan)
        others = [idx for idx in range(plan.ranks) if idx != plan.rank]
        post(
            group,
            [(ranks[idx], own) for idx in others],
            [(ranks[idx], parts[idx]) for idx in others],
        ).wait()
    shape[dim] = plan.length
    out = x.new_empty(shape)
    whole = contiguous([plan.length])[0]
    for part, segments in zip(parts, plan.segments, strict=True):
        first = 0
        for one in segments:
            place = place_in(one, whole)
            _run(out, dim, place.first, place.size, place.step).copy_(
                part.narrow(dim, first, one.size)
            )
            first += one.size
    return out


def _numbers_in(group: ProcessGroup, plan: Plan) -> list[int]:
    """Return the ranks' numbers in the group of all."""
    if size_of(group) != plan.ranks or rank_of(group) != plan.rank:
        raise InvalidInputError(
            f"the plan is of {plan.ranks} ranks, this being {plan.rank}: the group has "
            f"{size_of(group)}, this being {rank_of(group)}; make a plan for this group"
        )
    return list(range(plan.ranks))

"""Computes the launches of a block, forward and backward, and merges what they give.

A launch gives the attention of its rows to its keys alone, and their LSE. Two such results become
one by the LSE: exact, in fp32, in the order of the blocks, so bitwise equal from run to run.
Backward, with out and the LSE of all keys, every launch gives its own part of the gradients (as
FlashAttention-2 does with its blocks of keys, arXiv:2307.08691, §3.1): on a GPU by the backward
kernels, without computing the forward pass again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from jitattn.api.attention import attention, bind
from jitattn.distributed.lowering import arguments_of, tables_of
from jitattn.request.scores import added_tensor, captured_names
from jitattn.run.backward import run_backward
from jitattn.values.autocast import outside_autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from jitattn.distributed.lowering import Launch
    from jitattn.distributed.options import Options


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: fp32, and fp64 of fp64."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any], out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Call `attention` for out and LSE."""
    out, lse = attention(q, k, v, **given, out_dtype=out_dtype, return_lse=True)
    return out, lse


class Sums:
    """The result over the keys so far: out [B, Lq, Hq, Dv] and LSE [B, Hq, Lq], in fp32.

    Out has another dtype if `out_dtype` says so, where a single launch gives all of it.
    """

    def __init__(self, q: Tensor, head_dim_v: int, out_dtype: torch.dtype | None = None) -> None:
        batch, rows, heads = q.shape[:3]
        wide = wide_dtype(q.dtype)
        self.out = q.new_empty((batch, rows, heads, head_dim_v), dtype=out_dtype or wide)
        self.lse = q.new_empty((batch, heads, rows), dtype=wide)
        self._known: list[tuple[int, int]] = []  # rows that have a result, apart from each other

    def room(self, rows: slice) -> Tensor | None:
        """Return where the first result of some rows may be written to; None: there is one."""
        if any(rows.start < stop and start < rows.stop for start, stop in self._known):
            return None
        return self.out[:, rows]

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge the result of other keys for some rows; their first one may lie in `room`."""
        if self.room(rows) is not None:
            if out.data_ptr() != self.out[:, rows].data_ptr():
                self.out[:, rows] = out
            self.lse[:, :, rows] = lse
            self._known.append((rows.start, rows.stop))
            return
        self.fill(rows)
        own_out, own_lse = self.out[:, rows], self.lse[:, :, rows]
        # The new keys' part of the weights; 0 where neither sees a key.
        part = torch.sigmoid(lse - own_lse).masked_fill_(lse == float("-inf"), 0.0)
        own_out.lerp_(out, part.transpose(1, 2)[..., None])
        torch.logaddexp(own_lse, lse, out=own_lse)

    def fill(self, rows: slice) -> None:
        """Give rows without a result that of no keys."""
        start = rows.start
        for known in [*sorted(self._known), (rows.stop, rows.stop)]:
            stop = min(known[0], rows.stop)
            if start < stop:
                self.out[:, start:stop] = 0.0
                self.lse[:, :, start:stop] = float("-inf")
                self._known.append((start, stop))
            start = max(start, known[1])


@outside_autocast
def compute(
    q: Tensor, k: Tensor, v: Tensor, launches: Sequence[Launch], options: Options, sums: Sums
) -> None:
    """Add the results of launches over a block of keys.

    Parameters
    ----------
    q : Tensor, [B, rows, Hq, D]; packed sequences: B = 1
    k, v : Tensor, [B, keys, Hkv, D or Dv]
    """
    wide = wide_dtype(q.dtype)
    for launch in launches:
        given = arguments_of(launch, options, q.device)
        rows, keys = _slices(launch, options, q)
        inputs = _inputs(q, k, v, rows, keys, options)
        if options.is_flat:  # rows of no sequence would stay as they are in a given tensor
            out, lse = attend(*inputs, given, wide)
            out, lse = out[None], lse[None]
        else:
            room = sums.room(rows)
            out_dtype = wide if room is None else room.dtype
            out, lse = attend(*inputs, {**given, "out": room}, out_dtype)
        sums.add(rows, out, lse)


def _slices(launch: Launch, options: Options, q: Tensor) -> tuple[slice, slice]:
    """Return the rows and keys of a launch; packed sequences name their own."""
    if options.is_flat:
        return slice(0, q.shape[1]), slice(None)
    one = launch.pieces[0]
    return slice(one.row, one.row + one.num_rows), slice(one.key, one.key + one.num_keys)


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    if options.is_flat:
        return q[0], k[0], v[0]
    return q[:, rows], k[:, keys], v[:, keys]


class Result(NamedTuple):
    """Out and LSE over all keys, and the gradients that reached them."""

    out: Tensor  #: [B, Lq, Hq, Dv]
    lse: Tensor  #: [B, Hq, Lq]
    d_out: Tensor
    d_lse: Tensor | None


class Gradients:
    """Sums of gradients of a rank's q and of the tensors that all launches share, in fp32."""

    def __init__(self, q: Tensor, shared: Sequence[Tensor]) -> None:
        self.dq = torch.zeros_like(q, dtype=wide_dtype(q.dtype))
        self.shared = [torch.zeros_like(one, dtype=wide_dtype(one.dtype)) for one in shared]


@outside_autocast
def differentiate(
    inputs: tuple[Tensor, Tensor, Tensor],
    result: Result,
    launches: Sequence[Launch],
    options: Options,
    shared: Sequence[Tensor],
    sums: Gradients,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a block of keys, dk and dv in fp32, and add those of q.

    Parameters
    ----------
    inputs : (q, k, v)
    result : Result
        Over all keys.
    shared : sequence of Tensor
        Biases by distance and captured tensors that need gradients, which `options` holds.
    """
    q, k, v = inputs
    dk, dv = (torch.zeros_like(x, dtype=wide_dtype(x.dtype)) for x in (k, v))
    for launch in launches:
        rows, keys = _slices(launch, options, q)
        own = _inputs(q, k, v, rows, keys, options)
        d_lse = None if result.d_lse is None else result.d_lse[:, :, rows]
        part = Result(result.out[:, rows], result.lse[:, :, rows], result.d_out[:, rows], d_lse)
        if options.is_flat:
            part = Result(
                part.out[0], part.lse[0], part.d_out[0], None if d_lse is None else d_lse[0]
            )
        run = _by_kernels if q.is_cuda else _by_autograd
        found = run(own, part, launch, options, shared)
        axis = None if options.is_flat else 0
        for total, place, gradient in (
            (sums.dq, rows, found[0]), (dk, keys, found[1]), (dv, keys, found[2]),
        ):  # fmt: skip
            if gradient is not None:
                total[:, place] += gradient[None] if axis is None else gradient
        for total, gradient in zip(sums.shared, found[3:], strict=True):
            if gradient is not None:
                total += gradient
    return dk, dv


def _by_kernels(
    inputs: tuple[Tensor, Tensor, Tensor],
    result: Result,
    launch: Launch,
    options: Options,
    shared: Sequence[Tensor],
) -> list[Tensor | None]:
    """Run the backward kernels of a launch, with out and the LSE over all keys."""
    q, k, v = inputs
    given = arguments_of(launch, options, q.device)
    with torch.enable_grad():  # tables of a launch are made of the shared ones
        tables = tables_of(launch, options)
    out_dtype = None if result.out.dtype is q.dtype else result.out.dtype
    given = {**given, **{name: one.detach() for name, one in tables.items()}}
    call = bind(q, k, v, {**given, "out_dtype": out_dtype, "return_lse": True})[1]
    captured = [
        (name, [added_tensor(call.scores, name) is one for one in shared].index(True))
        for name in captured_names(call.scores)
        if any(added_tensor(call.scores, name) is one for one in shared)
    ]
    wanted = [name for name, one in tables.items() if one.requires_grad]
    wanted += [name for name, _ in captured]
    found = run_backward(q, k, v, result.out, result.lse, result.d_out, result.d_lse, call, wanted)
    through = [(tables[name], found.added[name]) for name in wanted if name in tables]
    of_shared = _of_shared(through, shared)
    for name, idx in captured:
        own, other = found.added[name], of_shared[idx]
        of_shared[idx] = own if other is None else other + own
    return [found.dq, found.dk, found.dv, *of_shared]


def _of_shared(
    through: list[tuple[Tensor, Tensor]], shared: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of shared tensors from those of the tables made of them."""
    if not through or not shared:
        return [None] * len(shared)
    found = torch.autograd.grad(
        [table for table, _ in through],
        list(shared),
        [gradient.to(table.dtype) for table, gradient in through],
        allow_unused=True,
    )
    return list(found)


def _by_autograd(
    inputs: tuple[Tensor, Tensor, Tensor],
    result: Result,
    launch: Launch,
    options: Options,
    shared: Sequence[Tensor],
) -> list[Tensor | None]:
    """Differentiate a launch on the CPU, whose forward pass is computed again.

    With w = exp(lse_of_launch - lse), out is the sum of w out_of_launch, and the gradient that
    reaches lse_of_launch is w (d_out . out_of_launch + d_lse - d_out . out).
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        given = arguments_of(launch, options, leaves[0].device)
        wide = wide_dtype(leaves[0].dtype)
        out, lse = attend(leaves[0], leaves[1], leaves[2], given, wide)
    flat = options.is_flat
    weight = torch.exp(lse.detach() - result.lse)
    weight = weight.masked_fill(lse.detach() == float("-inf"), 0.0)
    d_out = result.d_out.to(wide)
    of_rows = _swapped((d_out * (out.detach() - result.out.to(wide))).sum(-1), flat)
    d_lse = of_rows if result.d_lse is None else of_rows + result.d_lse
    reached = [d_out * _swapped(weight, flat)[..., None], weight * d_lse]
    found = torch.autograd.grad([out, lse], [*leaves, *shared], reached, allow_unused=True)
    return list(found)


def _swapped(x: Tensor, flat: bool) -> Tensor:
    """Swap rows and heads: [B, L, H] and [B, H, L], or [L, H] and [H, L]."""
    return x.transpose(0, 1) if flat else x.transpose(1, 2)

"""Attention of a rank's rows to the keys of all ranks of a ring, while these are on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from jitattn.distributed.compute import Gradients, Result, Sums, compute, differentiate, wide_dtype
from jitattn.distributed.transfers import NOTHING, post

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from jitattn.distributed.blocks import Block, Part
    from jitattn.distributed.options import Options
    from jitattn.distributed.transfers import Pending


#: Messages under way, and the keys and values that they bring, in one tensor each or in parts.
_Keys: TypeAlias = "tuple[Tensor | list[Tensor], Tensor | list[Tensor]]"
_Arriving: TypeAlias = "tuple[Pending, _Keys]"


class Job(NamedTuple):
    """A call on a ring, without its tensors."""

    group: ProcessGroup | None  #: None: this rank alone, of one block
    blocks: tuple[Block, ...]
    options: Options
    out_dtype: torch.dtype
    shared: tuple[Tensor, ...]  #: of `options`, that need gradients
    rank: int


def job_of(
    group: ProcessGroup | None,
    blocks: tuple[Block, ...],
    options: Options,
    out_dtype: torch.dtype,
    rank: int,
) -> Job:
    """Return a call on a ring."""
    biases = (options.relative_bias, options.alibi_slopes)
    shared = [one for one in biases if one is not None and one.requires_grad]
    shared += [one for one in options.captured if all(one is not other for other in shared)]
    return Job(group, blocks, options, out_dtype, tuple(shared), rank)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    """Compute the attention of q to the keys of all ranks; differentiable once.

    Parameters
    ----------
    q : Tensor, [B, rows, Hq, D]
        This rank's; of packed sequences B is 1.
    k, v : Tensor, [B, keys, Hkv, D or Dv]
        This rank's.

    Returns
    -------
    out : Tensor, [B, rows, Hq, Dv], `job.out_dtype`
    lse : Tensor, [B, Hq, rows], fp32
    """
    out, lse = _Ring.apply(job, q, k, v, *job.shared)  # type: ignore[no-untyped-call]
    return out, lse


class _Ring(Function):
    """The autograd function of a ring."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        job: Job,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *shared: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Compute block after block, each while the next one arrives."""
        arriving = _first(job, k, v)
        sums = Sums(q, v.shape[-1], job.out_dtype if _is_at_once(job, q) else None)
        for idx, block in enumerate(job.blocks):
            pending, keys = arriving
            pending.wait()
            here = _laid_out(keys, k, v)
            if idx + 1 < len(job.blocks):
                arriving = _fetch(job, job.blocks[idx + 1], k, v)
            if block.launches:
                compute(q, here[0], here[1], block.launches, job.options, sums)
        sums.fill(slice(0, q.shape[1]))
        out, lse = sums.out.to(job.out_dtype), sums.lse
        ctx.job = job
        ctx.save_for_backward(q, k, v, out, lse, *shared)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:  # noqa: ANN401
        """Compute block after block again; send the gradients of others' keys to them."""
        q, k, v, out, lse, *_ = ctx.saved_tensors  # which raises if one was written to
        job: Job = ctx.job
        shared = job.shared
        d_out = torch.zeros_like(out) if d_out is None else d_out
        result = Result(out, lse, d_out, d_lse)
        sums = Gradients(q, shared)
        own = [torch.zeros_like(x, dtype=wide_dtype(x.dtype)) for x in (k, v)]
        arriving = _first(job, k, v)
        returning: _Returning | None = None
        for idx, block in enumerate(job.blocks):
            pending, keys = arriving
            pending.wait()
            here = _laid_out(keys, k, v)
            if idx + 1 < len(job.blocks):
                arriving = _fetch(job, job.blocks[idx + 1], k, v)
            found = differentiate(
                (q, here[0], here[1]), result, block.launches, job.options, shared, sums
            )
            if idx == 0 and not block.parts:
                own = list(found)
                continue
            if returning is not None:
                returning.add_to(own)
            returning = _give_back(job, block, found, own)
        if returning is not None:
            returning.add_to(own)
        of_shared = [one.to(x.dtype) for one, x in zip(sums.shared, shared, strict=True)]
        return None, sums.dq.to(q.dtype), own[0].to(k.dtype), own[1].to(v.dtype), *of_shared


def _first(job: Job, k: Tensor, v: Tensor) -> _Arriving:
    """Return the keys of the first block: this rank's own, or all that it needs."""
    return _fetch(job, job.blocks[0], k, v) if job.blocks[0].parts else (NOTHING, (k, v))


def _is_at_once(job: Job, q: Tensor) -> bool:
    """Return whether one launch gives the result of all rows, so that nothing merges."""
    if len(job.blocks) != 1 or len(job.blocks[0].launches) != 1 or job.options.is_flat:
        return False
    return job.blocks[0].launches[0].pieces[0].num_rows == q.shape[1]


def _fetch(job: Job, block: Block, k: Tensor, v: Tensor) -> _Arriving:
    """Begin to receive the keys and values of a block, and to send those of others' blocks."""
    sends = [(part.rank, _rows(x, part)) for part in block.sends for x in (k, v)]
    arriving = [
        [_rows(x, part) if part.rank == job.rank else _empty(x, part) for part in block.parts]
        for x in (k, v)
    ]
    receives = [
        (part.rank, x)
        for part, *both in zip(block.parts, *arriving, strict=True)
        for x in both
        if part.rank != job.rank
    ]
    return post(job.group, sends, receives), (arriving[0], arriving[1])


def _rows(x: Tensor, part: Part) -> Tensor:
    return x[:, part.rows[0] : part.rows[1]].contiguous()


def _empty(x: Tensor, part: Part, dtype: torch.dtype | None = None) -> Tensor:
    shape = (x.shape[0], part.rows[1] - part.rows[0], *x.shape[2:])
    return x.new_empty(shape, dtype=dtype)


def _laid_out(keys: _Keys, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a block, tensors or lists of parts, in one tensor each."""
    of_k, of_v = keys
    return _whole(of_k, k), _whole(of_v, v)


def _whole(parts: Tensor | list[Tensor], like: Tensor) -> Tensor:
    if isinstance(parts, torch.Tensor):
        return parts
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=1) if parts else like[:, :0]


class _Returning(NamedTuple):
    """Gradients of this rank's keys on their way from others."""

    pending: Pending
    parts: tuple[Part, ...]
    arriving: list[list[Tensor]]

    def add_to(self, own: list[Tensor]) -> None:
        """Wait for them, and add them in the order of the schedule."""
        self.pending.wait()
        for total, arrived in zip(own, self.arriving, strict=True):
            for part, gradient in zip(self.parts, arrived, strict=True):
                total[:, part.rows[0] : part.rows[1]] += gradient


def _give_back(
    job: Job, block: Block, found: tuple[Tensor, Tensor], own: list[Tensor]
) -> _Returning:
    """Begin to send the gradients of a block's keys to the ranks that have these."""
    sends, first = [], 0
    for part in block.parts:
        count = part.rows[1] - part.rows[0]
        parts = [x[:, first : first + count] for x in found]
        first += count
        if part.rank != job.rank:
            sends += [(part.rank, x.contiguous()) for x in parts]
            continue
        for total, x in zip(own, parts, strict=True):
            total[:, part.rows[0] : part.rows[1]] += x
    arriving = [[_empty(x, part) for part in block.sends] for x in own]
    receives = [
        (part.rank, x) for part, *both in zip(block.sends, *arriving, strict=True) for x in both
    ]
    return _Returning(post(job.group, sends, receives), block.sends, arriving)

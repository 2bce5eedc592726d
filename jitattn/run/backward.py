"""Executes the backward pass on a GPU: prepares operands, runs the plan, returns gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import InternalError, UnsupportedError
from jitattn.jit import backend
from jitattn.plan.backward import Backward, backward
from jitattn.plan.backward_pass import BackwardOperands
from jitattn.plan.kv_parts import KvGradient
from jitattn.request.problem import is_deterministic
from jitattn.request.request import request_of
from jitattn.request.scores import added_tensor
from jitattn.run.captured_gradients import captured_gradients
from jitattn.run.execute import BoundPlan, LoadedDevice, add_block_lists
from jitattn.run.score_gradients import score_gradients
from jitattn.spec.enums import Access, SeqLayout
from jitattn.values.masks import parts_of
from jitattn.values.sequences import Padded, Paged, overlaps
from jitattn.values.tensors import DTYPES, readable

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from jitattn.request.facts import Addresses
    from jitattn.request.problem import Call, Strides
    from jitattn.request.request import Request

#: log2 of the magnitude to which dS and dO are scaled at most, as fp16 operands.
_LARGEST_FP16_LOG2: Final = 15.0


class Gradients(NamedTuple):
    """The gradients of a call; None where none was requested."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    added: dict[str, Tensor]  #: those asked for of what is added to scores, as `Scores` names it


class _Rows(NamedTuple):
    """The row and head dimensions of a tensor like q."""

    is_flat: bool
    row: int
    head: int

    @classmethod
    def of(cls, q: Tensor, layout: str) -> _Rows:
        """Return the row and head dimensions of q."""
        if q.dim() == 3:
            return cls(True, 0, 1)
        return cls(False, 1, 2) if layout == "bshd" else cls(False, 2, 1)

    def strides(self, tensor: Tensor) -> Strides:
        """Return the (batch, row, head) strides of a tensor like q."""
        stride = tensor.stride()
        return (0 if self.is_flat else stride[0], stride[self.row], stride[self.head])

    def by_head(self, tensor: Tensor) -> Strides:
        """Return the (batch, head, row) strides of a tensor like the LSE."""
        stride = tensor.stride()
        return (0 if self.is_flat else stride[0], stride[-2], stride[-1])


def settle_overlaps(call: Call) -> None:
    """Determine whether key sequences overlap; cached with the sequences value."""
    if call.kv_seqs is not None:
        overlaps(call.kv_seqs)


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    call: Call,
    wanted: Collection[str] = (),
) -> Gradients:
    """Compute the gradients of a call of `attention`, given its results and their gradients.

    Parameters
    ----------
    q, k, v : Tensor
        As they were given, on a GPU.
    out, lse : Tensor
        As they were returned.
    d_out : Tensor, like `out`
    d_lse : Tensor, like `lse`, optional
    call : Call
    wanted : collection of str
        Those of `request.scores.ADDED` and of captured tensors that need gradients.

    Raises
    ------
    UnsupportedError
        Sequences of keys overlap, or the call needs more CTAs than a grid has.
    """
    if call.kv_seqs is not None and overlaps(call.kv_seqs):
        raise UnsupportedError(
            "sequences of kv_seqs overlap: their keys would have several gradients at a time; give "
            "each its own rows"
        )
    negated = call.scale is not None and call.scale < 0
    if call.scale is not None and negated:
        # q k^T * -s = q (-k)^T * s
        k, call = -k, call._replace(scale=-call.scale)
    if call.out is not None:
        call = call._replace(out=None)
    request, addresses = request_of(q, k, v, call)
    runtime = request.runtime
    out, lse = readable("out", out), readable("lse", lse)
    d_out = readable("the gradient of out", d_out)
    d_lse = None if d_lse is None else readable("the gradient of the LSE", d_lse)
    dense = torch.contiguous_format
    sizes = (runtime.batch, runtime.len_q, runtime.len_kv, q.numel(), k.numel(), v.numel())
    is_empty = 0 in sizes
    is_sparse = is_empty or request.problem.kv_layout is not SeqLayout.BATCHED
    like = torch.zeros_like if is_sparse else torch.empty_like
    dk, dv = like(k, memory_format=dense), like(v, memory_format=dense)
    dq = (torch.zeros_like if is_empty else torch.empty_like)(q, memory_format=dense)
    with backend.active.on_device(q.get_device()):
        if is_empty:
            zeros = {
                name: torch.zeros_like(added_tensor(call.scores, name), memory_format=dense)
                for name in wanted
            }
            return Gradients(dq, dk, dv, zeros)
        tensors = (v, out, lse, d_out, d_lse)
        added = _launch(request, addresses, call, (dq, dk, dv), tensors, wanted)
    return Gradients(dq, -dk if negated else dk, dv, added)


def _launch(
    request: Request,
    addresses: Addresses,
    call: Call,
    results: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    """Compute dq, dk and dv in place, and return the other gradients.

    `tensors` are v, out, lse, d_out and d_lse.
    """
    v, out, lse, d_out, d_lse = tensors
    dq, dk, dv = results
    d_out_scale = _scale_of_d_out(dq.dtype, v, d_out, d_lse, call)
    out, of_rows = _in_lines(out), _in_lines(d_out.to(out.dtype))
    main = d_out.to(dq.dtype) if d_out_scale is None else (d_out * d_out_scale[0]).to(dq.dtype)
    needs_copy = main.stride(-1) != 1 and main.shape[-1] > 1
    if needs_copy or (request.problem.access is Access.VEC16 and not _is_aligned(main)):
        main = main.clone(memory_format=torch.contiguous_format)  # contiguous() keeps addresses
    rows = _Rows.of(dq, call.layout)
    bias, dropout = call.scores.bias, call.scores.dropout
    has_bias = bias is not None and "bias" in wanted
    operands = BackwardOperands(
        batch=1 if rows.is_flat else dq.shape[0],
        length=dq.shape[rows.row],
        is_flat=rows.is_flat,
        out_strides=rows.strides(out),
        d_out_strides=rows.strides(of_rows),
        main_d_out_strides=rows.strides(main),
        lse_strides=rows.by_head(lse),
        d_lse_strides=None if d_lse is None else rows.by_head(d_lse),
        is_aligned=_is_aligned(out) and _is_aligned(of_rows),
        has_scale=d_out_scale is not None,
        dq_strides=rows.strides(dq),
        dk=_kv_gradient("dk", dk, call),
        dv=_kv_gradient("dv", dv, call),
        wanted=tuple(wanted),
        bias_shape=tuple(bias.shape) if bias is not None and has_bias else None,
        bias_dtype=str(DTYPES[bias.dtype]) if bias is not None and has_bias else "",
        dropout_scale=1.0 if dropout is None else dropout.scale,
        num_splits=call.num_splits,
        deterministic=is_deterministic(call),
    )
    index = dq.get_device()
    ready: tuple[Backward, BoundPlan] | None = request.plans.get(operands)
    if ready is None:
        here = LoadedDevice(index)
        planned = backward(request.problem, request.runtime_of(call), operands, here)
        ready = request.plans[operands] = planned, BoundPlan(planned.plan, index, dq.device)
    planned, bound = ready
    used = {
        "out": out, "lse": lse, "d_lse": d_lse, "d_out_of_rows": of_rows, "d_out": main,
        "d_out_scale": d_out_scale, "dq": dq, "dk": dk, "dv": dv,
    }  # fmt: skip
    if planned.needs_entries:
        used["entries"], used["bounds"] = _entries(dk, call)
    addresses.update((name, x.data_ptr()) for name, x in used.items() if x is not None)
    runtime = request.runtime
    lists = [
        add_block_lists(
            addresses,
            parts_of(call.mask).rule,
            (runtime.heads_q, runtime.heads_kv),
            planned.longest_listed,
            positions,
            dq.device,
        )
        for positions in planned.tile_positions
    ]
    buffers = bound.run(addresses, backend.active.stream(index))
    del lists, used  # kept alive until all their readers are launched
    found = score_gradients(buffers, call.scores, runtime, planned.bias_differs, wanted)
    return found | captured_gradients(buffers, call.scores, request, wanted, d_out_scale)


def _in_lines(tensor: Tensor) -> Tensor:
    """Return a tensor with contiguous rows, copied if necessary."""
    return tensor.contiguous() if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 else tensor


def _kv_gradient(name: str, gradient: Tensor, call: Call) -> KvGradient:
    row = 1 if call.layout == "bshd" or isinstance(call.kv_seqs, Paged) else 2
    return KvGradient(name, tuple(gradient.shape), row, gradient.dim() == 3)


def _scale_of_d_out(
    dtype: torch.dtype, v: Tensor, d_out: Tensor, d_lse: Tensor | None, call: Call
) -> Tensor | None:
    """Return a power-of-two scale by which dO and dS fit fp16, and its inverse, on the device.

    Gradients of fp32 results may have any magnitude. |dS| <= |dP| + |delta|, and both terms are at
    most |dO| |v|, as products of rows of dO with rows of v or their weighted means. Non-finite rows
    are ignored here: they reach the gradients that depend on them in any case.
    """
    if dtype is not torch.float16 or (d_out.dtype is torch.float16 and d_lse is None):
        return None

    def largest(values: Tensor) -> Tensor:
        return values.nan_to_num(nan=0.0, posinf=0.0).amax()

    of_rows, of_v = (largest(torch.linalg.vector_norm(x.float(), dim=-1)) for x in (d_out, v))
    bound = 2.0 * of_rows * of_v
    if call.scores.dropout is not None:
        bound = bound * call.scores.dropout.scale
    if d_lse is not None:
        bound = bound + largest(d_lse.abs())
    size = torch.maximum(bound, of_rows).clamp(min=1e-30, max=1e30)
    exponent = (_LARGEST_FP16_LOG2 - size.log2()).floor()
    return torch.stack([exponent, -exponent]).exp2()


def _is_aligned(tensor: Tensor) -> bool:
    """Return whether all rows begin and end at multiples of 16 bytes."""
    units = tensor.data_ptr() | tensor.shape[-1] * tensor.element_size()
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size > 1:
            units |= stride * tensor.element_size()
    return units & 15 == 0


def _entries(gradient: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Sort the places of a block table by page, and return them with each page's first place.

    Places beyond the keys of their sequence come last, behind all pages.
    """
    seqs, num_pages = call.kv_seqs, gradient.shape[0]
    if isinstance(seqs, Paged):
        pages, page_size = seqs.block_table, gradient.shape[1]
        width = pages.shape[1]
        begin = torch.arange(width, device=gradient.device, dtype=torch.int64) * page_size
        start = 0 if seqs.start is None else seqs.start[:, None]
        stop = seqs.length[:, None] + start
        is_used = (begin < stop) & (begin + page_size > start)
    elif isinstance(seqs, Padded) and seqs.batch_idx is not None:
        pages = seqs.batch_idx[:, None]
        is_used = torch.ones_like(pages, dtype=torch.bool)
    else:
        raise InternalError("no sequences share keys")
    is_used = is_used & (pages >= 0) & (pages < num_pages)
    ordered, entries = pages.long().masked_fill(~is_used, num_pages).flatten().sort(stable=True)
    every = torch.arange(num_pages + 1, device=gradient.device, dtype=torch.int64)
    return entries, torch.searchsorted(ordered, every)

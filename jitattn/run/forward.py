"""The forward pass: a request, its plan, its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from jitattn.cpu.attention import run_cpu
from jitattn.cpu.norm import normalized as normalized_on_cpu
from jitattn.errors import NO_FORWARD_MODE, InternalError, LaunchError, UnsupportedError
from jitattn.jit import backend, launch
from jitattn.plan.forward import Forward, forward
from jitattn.request.norm import call_of_normalized
from jitattn.request.problem import is_deterministic
from jitattn.request.request import forget_requests, request_of
from jitattn.request.scores import NO_CHANGES
from jitattn.run import normalize
from jitattn.run.autograd import Attention, Normalize, apply
from jitattn.run.backward import settle_overlaps
from jitattn.run.execute import BoundPlan, LoadedDevice, add_lists
from jitattn.spec.enums import SeqLayout
from jitattn.values.masks import parts_of
from jitattn.values.sequences import Ragged
from jitattn.values.write_tracking import guard

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from jitattn.request.problem import Call, Runtime, Strides
    from jitattn.request.request import Addresses, Request


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention` on torch tensors."""
    request, addresses = request_of(q, k, v, call)
    return run_request(q, k, v, request, addresses, call)


def run_request(
    q: Tensor, k: Tensor, v: Tensor, request: Request, addresses: Addresses, call: Call
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a call that was checked."""
    norm = call.scores.qk_norm
    if norm is not None and norm.normalize:
        if not q.is_cuda:
            return _cosine_on_cpu(q, k, v, request.runtime, call)
        check_cuda()
        if is_followed(q, k, norm.head_scale):
            q, k = apply(Normalize, q, k, norm.head_scale, norm, call)
        else:
            q, k = normalize.normalized(q, k, norm, call)
        call = call_of_normalized(call, request.runtime.scale)
        request, addresses = request_of(q, k, v, call)
    if not q.is_cuda:
        return run_cpu(q, k, v, request.runtime, call)
    scores = call.scores
    added = (scores.bias, scores.relative_bias, scores.alibi_slopes, scores.sinks)
    if not is_followed(q, k, v, *(() if scores is NO_CHANGES else added)):
        return _run_cuda(q, k, v, request, addresses, call)
    settle_overlaps(call)
    call = call._replace(deterministic=is_deterministic(call))

    def compute(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        result = _run_cuda(q, k, v, request, addresses, call)
        if not isinstance(result, tuple):
            raise InternalError("the LSE is missing")
        return result

    results = apply(Attention, q, k, v, *added, call, compute)
    return results if call.return_lse else results[0]


def _cosine_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, runtime: Runtime, call: Call
) -> Tensor | tuple[Tensor, Tensor]:
    norm = call.scores.qk_norm
    if norm is None:
        raise InternalError("the norm is missing")
    head_axis = 1 if call.layout == "bhsd" or isinstance(call.q_seqs, Ragged) else 2
    wide_q, wide_k = normalized_on_cpu(q, k, norm, head_axis)
    dtype = q.dtype if call.out_dtype is None else call.out_dtype
    result = run_cpu(wide_q, wide_k, v, runtime, call._replace(out_dtype=dtype))
    guard(result, [("q", q), ("k", k)])
    return result


def _run_cuda(
    q: Tensor, k: Tensor, v: Tensor, request: Request, addresses: Addresses, call: Call
) -> Tensor | tuple[Tensor, Tensor]:
    check_cuda()
    device_index = q.get_device()
    if device_index == backend.active.current_device():
        return _attend(q, v, request, addresses, call, device_index)
    with backend.active.on_device(device_index):
        return _attend(q, v, request, addresses, call, device_index)


def _attend(
    q: Tensor, v: Tensor, request: Request, addresses: Addresses, call: Call, device_index: int
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the plan of a request, on the current device."""
    runtime = request.runtime
    out, return_lse = call.out, call.return_lse
    # Rows that belong to no sequence are written by no kernel.
    is_sparse = request.problem.q_layout is not SeqLayout.BATCHED
    if out is None:
        make = q.new_zeros if is_sparse else q.new_empty
        out = make((*q.shape[:-1], request.problem.head_dim_v), dtype=call.out_dtype)
        addresses["out"] = out.data_ptr()
    lse = None
    if return_lse:
        lse = torch.empty(lse_shape(q, runtime), dtype=torch.float32, device=q.device)
        if is_sparse:
            lse.fill_(float("-inf"))
        addresses["lse"] = lse.data_ptr()
    if runtime.batch * runtime.heads_q * runtime.len_q:
        ready = request.plans.get(return_lse)
        if ready is None:
            planned = plan_of(request, call, out, lse, LoadedDevice(device_index))
            ready = planned, BoundPlan(planned.plan, device_index, q.device)
            request.plans[return_lse] = ready
        planned, bound = ready
        made = None
        if request.is_listed:
            rule, heads = parts_of(call.mask).rule, (runtime.heads_q, runtime.heads_kv)
            longest, positions = planned.longest_listed, planned.tile_positions
            made = add_lists(addresses, rule, heads, longest, positions, q.device)
        buffers = bound.run(addresses, backend.active.stream(device_index))
        del made  # until everything that reads them is launched
        if lse is not None and planned.along_mean:
            lse.add_(buffers[planned.along_mean].view(lse.shape), alpha=runtime.scale)
    return out if lse is None else (out, lse)


def plan_of(
    request: Request, call: Call, out: Tensor, lse: Tensor | None, here: LoadedDevice
) -> Forward:
    """Return the plan of a call that writes to `out` and `lse`."""
    is_flat = request.runtime.q_is_flat
    stride = out.stride()
    out_strides: Strides
    if is_flat:
        out_strides = (0, stride[0], stride[1])
    elif call.layout == "bshd":
        out_strides = (stride[0], stride[1], stride[2])
    else:
        out_strides = (stride[0], stride[2], stride[1])
    lse_strides = None
    if lse is not None:
        of_lse = lse.stride()
        lse_strides = (0, of_lse[0]) if is_flat else (of_lse[0], of_lse[1])
    runtime = request.runtime_of(call)
    return forward(request.problem, runtime, call, out_strides, lse_strides, here)


def lse_shape(q: Tensor, runtime: Runtime) -> tuple[int, ...]:
    """Return the shape of the LSE: [B, Hq, Lq], or [Hq, total] where q is flat."""
    if runtime.indices is None:
        return runtime.batch, runtime.heads_q, runtime.len_q
    if runtime.q_is_flat:
        return runtime.heads_q, q.shape[0]
    rows = q.numel() // max(1, runtime.batch * runtime.heads_q * q.shape[-1])
    return runtime.batch, runtime.heads_q, rows


def is_followed(*tensors: Tensor | None) -> bool:
    """Whether autograd follows an operation on these tensors.

    Raises
    ------
    UnsupportedError
        One of them is a dual number.
    """
    if forward_ad._current_level >= 0 and has_duals(tensors):
        raise UnsupportedError(NO_FORWARD_MODE)
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def has_duals(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a tensor is a dual number of forward mode, whose tangent a kernel would drop."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def check_cuda() -> None:
    """Refuse a process that cannot use its GPU."""
    if backend.active.is_in_bad_fork():
        raise LaunchError(
            "this process was forked from one that had used CUDA, which does not survive that; "
            "start worker processes with the 'spawn' start method"
        )


backend.on_change(forget_requests)


def forget_kernels() -> None:
    """Forget which kernels calls have got: in a forked child, and in tests."""
    forget_requests()
    launch.unload_all()

"""Executes the forward pass: request, plan, launch, result."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.autograd import forward_ad

from jitattn.cpu.attention import run_cpu
from jitattn.cpu.norm import normalized as normalized_on_cpu
from jitattn.errors import NO_FORWARD_MODE, InternalError, LaunchError, UnsupportedError
from jitattn.jit import backend, launch
from jitattn.plan.forward import Forward, deciding_facts, forward, keys_per_block, lengths_of
from jitattn.request.norm import call_of_normalized
from jitattn.request.problem import axes, is_deterministic
from jitattn.request.request import forget_requests, request_of
from jitattn.request.scores import NO_CHANGES, added_of
from jitattn.run import normalize, workspace
from jitattn.run.autograd import Attention, Normalize, apply
from jitattn.run.backward import settle_overlaps
from jitattn.run.execute import BoundPlan, LoadedDevice, add_block_lists
from jitattn.spec.enums import SeqLayout
from jitattn.values.masks import parts_of
from jitattn.values.sequences import Ragged
from jitattn.values.write_tracking import guard

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from torch import Tensor

    from jitattn.request.facts import Addresses
    from jitattn.request.problem import Call, Runtime, Strides
    from jitattn.request.request import Request


#: Plans that calls of different lengths share.
_shared: dict[tuple[Hashable, ...], tuple[BoundPlan, Forward]] = {}
_MOST_SHARED: Final = 1024


class _Ready(NamedTuple):
    """Per-request state of a warm call: the bound plan, and patterns of its results."""

    out: Tensor
    num_zeroed: int  #: bytes; all if some rows may belong to no sequence
    lse: Tensor | None  #: None: not requested
    bound: BoundPlan | None  #: None: there are no rows
    longest_listed: int
    tile_positions: int
    along_mean: str


class _AnyLength(NamedTuple):
    """State that the requests derived from one share, whatever their key counts."""

    out: Tensor  #: as in `_Ready`
    lse: Tensor | None
    keys_per_block: int
    bound: dict[int, BoundPlan]  #: by number of key blocks; the lengths are to be replaced


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention` on torch tensors."""
    request, addresses = request_of(q, k, v, call)
    return run_request(q, k, v, request, addresses, call)


def run_request(
    q: Tensor, k: Tensor, v: Tensor, request: Request, addresses: Addresses, call: Call
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the call of a validated request."""
    scores = call.scores
    if scores is not NO_CHANGES and (norm := scores.qk_norm) is not None and norm.normalize:
        if not q.is_cuda:
            return _cosine_on_cpu(q, k, v, request.runtime, call)
        check_cuda()
        if is_followed(q, k, norm.head_scale):
            q, k = apply(Normalize, q, k, norm.head_scale, norm, call)
        else:
            q, k = normalize.normalized(q, k, norm, call)
        call = call_of_normalized(call, request.runtime.scale)
        scores = call.scores
        request, addresses = request_of(q, k, v, call)
    if not q.is_cuda:
        return run_cpu(q, k, v, request.runtime, call)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        added = () if scores is NO_CHANGES else added_of(scores)
        if scores.function is not None:
            added += scores.function.tensors
        if is_followed(q, k, v, *added):
            return _run_followed(q, k, v, added, request, addresses, call)
    out, lse = _run_cuda(q, request, addresses, call, call.return_lse)
    return out if lse is None else (out, lse)


def _run_followed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    added: tuple[Tensor | None, ...],
    request: Request,
    addresses: Addresses,
    call: Call,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the call of a validated request under autograd."""
    if call.kv_seqs is not None:
        settle_overlaps(call)
    if not call.deterministic and is_deterministic(call):  # torch's global switch may have changed
        call = call._replace(deterministic=True)
    compute = partial(_run_cuda, q, request, addresses, call, True)
    found: Tensor | tuple[Tensor, Tensor] = apply(Attention, call, compute, q, k, v, *added)
    return found


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
    q: Tensor, request: Request, addresses: Addresses, call: Call, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Allocate the results of a request and run its plan on the device of q."""
    plans = request.plans
    if not plans:  # true in a forked child as well
        check_cuda()
    device_index = q.get_device()
    if device_index != backend.active.current_device():
        with backend.active.on_device(device_index):
            return _run_cuda(q, request, addresses, call, return_lse)
    ready: _Ready | None = plans.get(return_lse)
    if ready is None:
        ready = plans[return_lse] = _make_ready(q, request, call, return_lse, device_index)
    out_pattern, num_zeroed, lse_pattern, bound, longest, positions, along_mean = ready
    stream = backend.active.stream(device_index)
    out, lse = call.out, None
    if out is None:
        out = torch.empty_like(out_pattern)
        addresses["out"] = at_out = out.data_ptr()
        if num_zeroed:
            backend.active.zero(at_out, num_zeroed, stream)
    if lse_pattern is not None:
        lse = torch.empty_like(lse_pattern)
        if num_zeroed:
            lse.fill_(-math.inf)
        addresses["lse"] = lse.data_ptr()
    if bound is not None:
        made = None
        if request.is_listed:
            runtime, rule = request.runtime, parts_of(call.mask).rule
            heads = runtime.heads_q, runtime.heads_kv
            made = add_block_lists(addresses, rule, heads, longest, positions, q.device)
        buffers = bound.run(addresses, stream)
        del made  # kept alive until all their readers are launched
        if along_mean and lse is not None:
            lse.add_(buffers[along_mean].view(lse.shape), alpha=request.runtime.scale)
    return out, lse


def _make_ready(
    q: Tensor, request: Request, call: Call, return_lse: bool, device_index: int
) -> _Ready:
    """Return the state of a request, by that of another key count if there is one."""
    base = request.base
    shared: _AnyLength | None = None if base is None else base.plans_of_lengths.get(return_lse)
    if shared is not None:
        found = shared.bound.get(-(-request.len_kv // shared.keys_per_block))
        if found is not None:
            bound = found.with_values(lengths_of(request))
            return _Ready(shared.out, 0, shared.lse, bound, 0, 0, "")
    shape = (*q.shape[:-1], request.problem.head_dim_v)
    out = workspace.pattern(shape, call.out_dtype or q.dtype, q.device)
    # No kernel writes rows that belong to no sequence.
    is_sparse = request.problem.q_layout is not SeqLayout.BATCHED
    num_zeroed = out.numel() * out.element_size() if is_sparse else 0
    lse = None
    if return_lse:
        lse = workspace.pattern(lse_shape(q, request.runtime), torch.float32, q.device)
    if not request.has_rows:
        return _Ready(out, num_zeroed, lse, None, 0, 0, "")
    strides = contiguous_strides(shape) if call.out is None else call.out.stride()
    of_lse = None if lse is None else contiguous_strides(tuple(lse.shape))
    bound, planned = _bound_plan(request, call, strides, of_lse, q.device, device_index)
    if base is not None and return_lse not in base.plans_of_lengths:
        here = LoadedDevice(device_index)
        step = keys_per_block(request.problem, request.runtime, call, here)
        shared = None if step is None else _AnyLength(out, lse, step, {})
        base.plans_of_lengths[return_lse] = shared
    if shared is not None and not planned.tiling.spec.tensor_maps:  # they hold the key count
        if len(shared.bound) >= _MOST_SHARED:
            shared.bound.clear()
        shared.bound[-(-request.len_kv // shared.keys_per_block)] = bound
    return _Ready(
        out, num_zeroed, lse, bound, planned.longest_listed, planned.tile_positions,
        planned.along_mean,
    )  # fmt: skip


def _bound_plan(
    request: Request,
    call: Call,
    stride: tuple[int, ...],
    lse_stride: tuple[int, ...] | None,
    like: torch.device,
    device_index: int,
) -> tuple[BoundPlan, Forward]:
    """Return the bound plan of a call, given its result strides; other calls may share it."""
    out_strides: Strides
    lse_strides = None
    if request.runtime.q_is_flat:
        out_strides = (0, stride[0], stride[1])
        lse_strides = None if lse_stride is None else (0, lse_stride[0])
    else:
        row, head = axes(call.layout)
        out_strides = (stride[0], stride[row], stride[head])
        lse_strides = None if lse_stride is None else (lse_stride[0], lse_stride[1])
    here = LoadedDevice(device_index)
    given = (request.problem, request.runtime_of(call), call, out_strides, lse_strides, here)
    facts = deciding_facts(*given)
    found = None if facts is None else _shared.get((*facts, device_index))
    if found is None:
        planned = forward(*given)
        found = BoundPlan(planned.plan, device_index, like), planned
        if facts is not None:
            if len(_shared) >= _MOST_SHARED:
                _shared.clear()
            _shared[(*facts, device_index)] = found
    bound, planned = found
    return bound.with_values(lengths_of(request)), planned


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * max(1, size))
    return tuple(reversed(steps))


def lse_shape(q: Tensor, runtime: Runtime) -> tuple[int, ...]:
    """Return the shape of the LSE: [B, Hq, Lq], or [Hq, total] for a flat q."""
    if runtime.indices is None:
        return runtime.batch, runtime.heads_q, runtime.len_q
    if runtime.q_is_flat:
        return runtime.heads_q, q.shape[0]
    rows = q.numel() // max(1, runtime.batch * runtime.heads_q * q.shape[-1])
    return runtime.batch, runtime.heads_q, rows


def is_followed(*tensors: Tensor | None) -> bool:
    """Return whether autograd records an operation on these tensors.

    Raises
    ------
    UnsupportedError
        One of them is a dual number.
    """
    if forward_ad._current_level >= 0 and has_duals(tensors):
        raise UnsupportedError(NO_FORWARD_MODE)
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator takes as long as the rest
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def has_duals(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether a tensor is a forward-mode dual, whose tangent a kernel would drop."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def check_cuda() -> None:
    """Refuse a forked process, whose CUDA context is unusable."""
    if backend.active.is_in_bad_fork():
        raise LaunchError(
            "this process was forked from one that had used CUDA, which does not survive that; "
            "start worker processes with the 'spawn' start method"
        )


backend.on_change(forget_requests)
backend.on_change(_shared.clear)


def forget_kernels() -> None:
    """Clear all cached plans: in a forked child, and in tests."""
    forget_requests()
    _shared.clear()
    launch.unload_all()

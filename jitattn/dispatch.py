"""From a validated call to its kernels: choose, allocate, launch.

`plan` decides without touching the tensors' contents; `run` carries the decision out. `explain`
reports it. The way down is: problem → row class and packing → spec → kernel → splits → launch.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.cpu import attention_cpu
from jitattn.errors import InvalidInputError, LaunchError, UnsupportedError
from jitattn.jit import launch
from jitattn.jit.device import device
from jitattn.jit.params import fast_divisor
from jitattn.jit.spec import FwdSpec, MergeSpec, RowClass
from jitattn.problem import parse
from jitattn.tiles import choose_splits, fwd_spec, heads_per_tile

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.jit.spec import KernelSpec, Problem
    from jitattn.masks import Mask
    from jitattn.problem import Runtime

_LOG2_E: Final = math.log2(math.e)
#: Stands for a scale of 0, with which a hidden score, -inf, would become NaN.
_TINY_SCALE: Final = 1e-30
#: Rows that a CTA of the merge kernel handles: one a warp.
_MERGE_ROWS: Final = MergeSpec.num_threads // 32

_fwd_kernels: dict[tuple[Problem, RowClass, int], _FwdKernel] = {}
_merge_kernels: dict[tuple[Problem, int], launch.Kernel] = {}
_divisors: dict[int, tuple[int, int]] = {}


class _FwdKernel(NamedTuple):
    """A loaded forward kernel with what `plan` needs of its tile."""

    loaded: launch.Kernel
    block_q: int
    block_kv: int


class Plan(NamedTuple):
    """How a call on the GPU is carried out."""

    kernel: launch.Kernel
    rows: RowClass
    heads_per_tile: int
    num_q_tiles: int
    num_splits: int
    num_ctas: int


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None,
    layout: str,
    gear: int | None,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
    num_splits: int | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention` on torch tensors; the arguments are those of `jitattn.attention`."""
    problem, runtime = parse(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        layout=layout,
        gear=gear,
        out=out,
        out_dtype=out_dtype,
        num_splits=num_splits,
        return_lse=return_lse,
    )
    if q.is_cuda:
        return _run_cuda(q, k, v, problem, runtime, layout, out, out_dtype, num_splits, return_lse)
    return _run_cpu(q, k, v, mask, runtime, layout, out, out_dtype, return_lse)


def plan(problem: Problem, runtime: Runtime, device_index: int, num_splits: int | None) -> Plan:
    """Choose kernel, packing and splits of a call with at least one row, on the current device.

    Raises
    ------
    LaunchError
        The kernel is not loaded and the stream is capturing a graph.
    UnsupportedError
        The call needs more CTAs than a grid has.
    """
    group = runtime.heads_q // runtime.heads_kv
    packed = heads_per_tile(runtime.len_q, group)
    num_rows = runtime.len_q * packed
    rows = RowClass.MANY
    if num_rows <= RowClass.ROWS64:
        rows = RowClass.ROWS16 if num_rows <= RowClass.ROWS16 else RowClass.ROWS64
    kernel = _fwd_kernels.get((problem, rows, device_index))
    if kernel is None:
        # Whether the keys are split depends on lengths, which must compile nothing: load both now.
        _merge_kernel(problem, device_index)
        spec = fwd_spec(problem, device(device_index).arch, rows)
        kernel = _FwdKernel(_kernel(spec, device_index), spec.tile.block_q, spec.tile.block_kv)
        _fwd_kernels[problem, rows, device_index] = kernel
    num_q_tiles = -(-num_rows // kernel.block_q)
    num_tiles = num_q_tiles * (runtime.heads_q // packed) * runtime.batch
    if num_splits is None:
        num_splits = choose_splits(
            num_tiles,
            -(-runtime.len_kv // kernel.block_kv),
            device(device_index).num_sms * kernel.loaded.blocks_per_sm,
        )
    num_ctas = num_tiles * num_splits
    if num_ctas > launch.MAX_GRID:
        raise UnsupportedError(
            f"the call needs {num_ctas} CTAs: a grid has at most 2**31 - 1; split the batch"
        )
    return Plan(kernel.loaded, rows, packed, num_q_tiles, num_splits, num_ctas)


def _run_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    runtime: Runtime,
    layout: str,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
    num_splits: int | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
        raise UnsupportedError(
            "an input on the GPU requires grad: the backward kernels do not exist yet; call under "
            "torch.no_grad(), detach the inputs, or use CPU tensors, which are differentiable"
        )
    if torch.cuda._is_in_bad_fork():
        raise LaunchError(
            "this process was forked from one that had used CUDA, which does not survive that; "
            "start worker processes with the 'spawn' start method"
        )
    batch, len_q, heads_q = runtime.batch, runtime.len_q, runtime.heads_q
    is_bshd = layout == "bshd"
    if out is None:
        shape = (
            (batch, len_q, heads_q, problem.head_dim_v)
            if is_bshd
            else (batch, heads_q, len_q, problem.head_dim_v)
        )
        out = q.new_empty(shape, dtype=out_dtype)
    lse = (
        torch.empty((batch, heads_q, len_q), dtype=torch.float32, device=q.device)
        if return_lse
        else None
    )
    if batch * heads_q * len_q:
        device_index = q.get_device()
        if device_index == torch._C._cuda_getDevice():
            _launch(q, k, v, out, lse, problem, runtime, is_bshd, device_index, num_splits)
        else:
            with torch.cuda.device(device_index):
                _launch(q, k, v, out, lse, problem, runtime, is_bshd, device_index, num_splits)
    return out if lse is None else (out, lse)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    problem: Problem,
    runtime: Runtime,
    is_bshd: bool,
    device_index: int,
    num_splits: int | None,
) -> None:
    kernel, _, packed, num_q_tiles, splits, num_ctas = plan(
        problem, runtime, device_index, num_splits
    )
    stream = torch._C._cuda_getCurrentRawStream(device_index)
    batch, len_q, heads_q = runtime.batch, runtime.len_q, runtime.heads_q
    stride = out.stride()
    out_strides = (
        (stride[0], stride[1], stride[2]) if is_bshd else (stride[0], stride[2], stride[1])
    )
    out_ptr = out.data_ptr()
    lse_ptr = 0 if lse is None else lse.data_ptr()
    partial_out_ptr = partial_lse_ptr = 0
    if splits > 1:
        # One allocation for both: [splits, B, Hq, Lq, Dv] and, after it, [splits, B, Hq, Lq].
        num_rows = batch * heads_q * len_q
        values = splits * num_rows * problem.head_dim_v
        partial = torch.empty(values + splits * num_rows, dtype=torch.float32, device=q.device)
        partial_out_ptr = partial.data_ptr()
        partial_lse_ptr = partial_out_ptr + 4 * values
    divisor = _divisors.get(packed)
    if divisor is None:
        divisor = _divisors[packed] = fast_divisor(packed)
    scale = runtime.scale
    kernel.launch(
        num_ctas,
        stream,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out_ptr,
        lse_ptr,
        partial_out_ptr,
        partial_lse_ptr,
        *runtime.q_strides,
        *runtime.k_strides,
        *runtime.v_strides,
        *out_strides,
        batch,
        len_q,
        runtime.len_kv,
        heads_q,
        heads_q // runtime.heads_kv,
        packed,
        num_q_tiles,
        splits,
        runtime.diagonal,
        scale < 0,
        *divisor,
        (abs(scale) or _TINY_SCALE) * _LOG2_E,
        0,
    )
    if splits > 1:
        _merge_kernel(problem, device_index).launch(
            -(-num_rows // _MERGE_ROWS),
            stream,
            partial_out_ptr,
            partial_lse_ptr,
            out_ptr,
            lse_ptr,
            *out_strides,
            num_rows,
            len_q,
            heads_q,
            splits,
            0,
        )


def _merge_kernel(problem: Problem, device_index: int) -> launch.Kernel:
    kernel = _merge_kernels.get((problem, device_index))
    if kernel is None:
        kernel = _kernel(merge_spec(problem, device(device_index).arch), device_index)
        _merge_kernels[problem, device_index] = kernel
    return kernel


def merge_spec(problem: Problem, arch: str) -> MergeSpec:
    """Return the spec of the kernel that merges the splits of `problem`."""
    return MergeSpec(out_dtype=problem.out_dtype, head_dim_v=problem.head_dim_v, arch=arch)


def specs_of_problem(problem: Problem, arch: str) -> list[KernelSpec]:
    """Return every kernel that calls with this problem can need, whatever their lengths."""
    forward = [fwd_spec(problem, arch, rows) for rows in RowClass]
    return [*dict.fromkeys(forward), merge_spec(problem, arch)]


def _kernel(spec: FwdSpec | MergeSpec, device_index: int) -> launch.Kernel:
    if not launch.is_loaded(spec, device_index) and torch.cuda.is_current_stream_capturing():
        raise LaunchError(
            f"the {spec.family} kernel of this call is not loaded, and the current stream is "
            "capturing a CUDA graph: compiling and loading are not possible then; call "
            "jitattn.warmup with the same arguments before the capture"
        )
    return launch.kernel(spec, device_index)


def _run_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    runtime: Runtime,
    layout: str,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    is_bshd = layout == "bshd"
    if not is_bshd:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    result = attention_cpu(
        q,
        k,
        v,
        mask=mask,
        scale=runtime.scale,
        out=out if out is None or is_bshd else out.transpose(1, 2),
        out_dtype=out_dtype or q.dtype,
        return_lse=True,
    )
    if not isinstance(result, tuple):
        raise InvalidInputError("the CPU path returned no LSE")
    computed, lse = result
    if out is not None:
        computed = out
    elif not is_bshd:
        computed = computed.transpose(1, 2)
    return (computed, lse) if return_lse else computed


def forget_kernels() -> None:
    """Forget which kernels calls have got: in a forked child, and in tests."""
    _fwd_kernels.clear()
    _merge_kernels.clear()
    launch.unload_all()


if hasattr(os, "register_at_fork"):
    # A child cannot use kernels that its parent loaded.
    os.register_at_fork(after_in_child=forget_kernels)

"""From a validated call to its kernels: choose, allocate, launch.

`plan` decides without touching the tensors' contents; `run` carries the decision out. `explain`
reports it. The way down is: problem → row class and packing → spec → kernel → splits → launch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.autograd import forward_ad

from jitattn.cpu.attention import run_cpu
from jitattn.cpu.norm import normalized as normalized_on_cpu
from jitattn.errors import (
    NO_FORWARD_MODE,
    InternalError,
    LaunchError,
    UnsupportedError,
)
from jitattn.jit import backend, launch
from jitattn.jit.device import device
from jitattn.jit.get_kernel import loaded_kernel
from jitattn.kernels.tiles import choose_splits, fwd_spec, heads_per_tile, merge_cost
from jitattn.request import block_lists as lists
from jitattn.request.layouts import of_normalized, parse
from jitattn.request.norm import call_of_normalized
from jitattn.request.problem import TILE_ROWS, is_deterministic
from jitattn.request.scores import NO_LEFT
from jitattn.run import normalize, workspace
from jitattn.run.autograd import ADDED, Attention, Normalize, apply
from jitattn.run.backward import settle_overlaps
from jitattn.run.prepare import prepare
from jitattn.run.workspace import arrivals
from jitattn.spec.enums import MaskKind, RowClass, SeqLayout
from jitattn.spec.params import FWD_SCORE_FIELDS, FWD_SEQ_FIELDS, divisor
from jitattn.values.sequences import Ragged
from jitattn.values.write_tracking import guard

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from jitattn.request.problem import Call, Runtime
    from jitattn.spec.kernel_spec import KernelSpec, Problem

_LOG2_E: Final = math.log2(math.e)
#: Stands for a scale of 0, with which a hidden score, -inf, would become NaN.
_TINY_SCALE: Final = 1e-30
#: A call with more query tiles than this many times the CTAs that the GPU holds needs no splits.
_BALANCED_TILES: Final = 4

#: Places of the left bound, and of the fields of patterns, among the score parameters.
_LEFT: Final = [name for name, _ in FWD_SCORE_FIELDS].index("left")
_LOCAL: Final = [name for name, _ in FWD_SCORE_FIELDS].index("local_blocks")
_NO_SEQUENCES: Final = (0,) * len(FWD_SEQ_FIELDS)

_fwd_kernels: dict[tuple[Problem, RowClass, int], _FwdKernel] = {}


class _FwdKernel(NamedTuple):
    """A loaded forward kernel with what `plan` needs of its tile."""

    loaded: launch.Kernel
    block_q: int
    block_kv: int
    num_slots: int  #: CTAs that the GPU holds at a time


class Plan(NamedTuple):
    """How a call on the GPU is carried out."""

    kernel: launch.Kernel
    rows: RowClass
    heads_per_tile: int
    num_q_tiles: int  #: of the longest sequence
    num_splits: int  #: 0: every CTA finds out from the lengths
    num_slots: int
    num_ctas: int
    rows_per_tile: int


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention` on torch tensors."""
    problem, runtime = parse(q, k, v, call)
    return run_parsed(q, k, v, problem, runtime, call)


def run_parsed(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, runtime: Runtime, call: Call
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a call that `layouts.parse` has checked."""
    norm = call.scores.qk_norm
    if norm is not None and norm.normalize:
        if not q.is_cuda:
            head_axis = 1 if call.layout == "bhsd" or isinstance(call.q_seqs, Ragged) else 2
            wide_q, wide_k = normalized_on_cpu(q, k, norm, head_axis)
            dtype = q.dtype if call.out_dtype is None else call.out_dtype
            result = run_cpu(wide_q, wide_k, v, runtime, call._replace(out_dtype=dtype))
            guard(result, [("q", q), ("k", k)])
            return result
        check_cuda()
        if is_followed(q, k, norm.head_scale):
            q, k = apply(Normalize, q, k, norm.head_scale, norm, call)
        else:
            q, k = normalize.normalized(q, k, norm, call)
        call = call_of_normalized(call, runtime.scale)
        problem, runtime = of_normalized(q, k, v, (problem, runtime), call)
    if not q.is_cuda:
        return run_cpu(q, k, v, runtime, call)
    added = [getattr(call.scores, name) for name in ADDED]
    if not is_followed(q, k, v, *added):
        return _run_cuda(q, k, v, problem, runtime, call)
    settle_overlaps(call)
    call = call._replace(deterministic=is_deterministic(call))

    def compute(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        result = _run_cuda(q, k, v, problem, runtime, call)
        if not isinstance(result, tuple):
            raise InternalError("the LSE is missing")
        return result

    results = apply(Attention, q, k, v, *added, call, compute)
    return results if call.return_lse else results[0]


def plan(
    problem: Problem,
    runtime: Runtime,
    device_index: int,
    num_splits: int | None,
    tile_rows: int | None = None,
) -> Plan:
    """Choose kernel, packing and splits of a call with at least one row, on the current device.

    Raises
    ------
    LaunchError
        The kernel is not loaded and the stream is capturing a graph.
    UnsupportedError
        The call needs more CTAs than a grid has.
    """
    packed = _packed(runtime)
    num_rows = runtime.len_q * packed
    rows = RowClass.MANY
    if tile_rows is not None:
        rows = TILE_ROWS[tile_rows]
    elif num_rows <= RowClass.ROWS64:
        rows = RowClass.ROWS16 if num_rows <= RowClass.ROWS16 else RowClass.ROWS64
    kernel = _fwd_kernels.get((problem, rows, device_index))
    if kernel is None:
        kernel = _fwd_kernels[problem, rows, device_index] = _load(problem, rows, device_index)
    if runtime.listed is not None:
        # Tiles begin where lists do: at most so many rows of the first one do not exist.
        num_rows += (tile_positions(kernel.block_q, packed) - 1) * packed
    num_q_tiles = -(-num_rows // kernel.block_q)
    head_tiles = runtime.heads_q // packed
    num_tiles = num_q_tiles * runtime.batch
    if runtime.indices is not None and (rows_in_all := runtime.indices.q_rows_in_all) is not None:
        # Fewer where most sequences are shorter than the longest: one more for each, at most.
        beyond = num_rows - runtime.len_q * packed
        rows_in_all = rows_in_all * packed + beyond * runtime.batch
        num_tiles = min(num_tiles, rows_in_all // kernel.block_q + runtime.batch)
    num_slots = kernel.num_slots
    num_items = num_tiles
    if runtime.indices is None:
        if num_splits is None:
            num_splits = choose_splits(
                num_tiles * head_tiles,
                _blocks_seen(problem, runtime, kernel),
                num_slots,
                merge_cost(kernel.block_q),
            )
        num_items *= num_splits
    elif num_splits is not None:
        num_items *= num_splits
    elif num_tiles * head_tiles > _BALANCED_TILES * num_slots:
        num_splits = 1
    else:
        # At most one item more than its share of the slots for each query tile.
        num_splits, num_items = 0, num_tiles + num_slots // head_tiles + 1
    num_ctas = num_items * head_tiles
    if num_ctas > launch.MAX_GRID:
        raise UnsupportedError(
            f"the call needs {num_ctas} CTAs: a grid has at most 2**31 - 1; split the batch"
        )
    return Plan(
        kernel.loaded,
        rows,
        packed,
        num_q_tiles,
        num_splits,
        num_slots,
        num_ctas,
        kernel.block_q,
    )


def _packed(runtime: Runtime) -> int:
    """Return how many query heads share a tile."""
    group = runtime.heads_q // runtime.heads_kv
    packed = heads_per_tile(runtime.len_q, group)
    if runtime.listed is None or packed == 1:
        return packed
    # A tile is of one list, and of a power of two of positions.
    agree = lists.heads_agree(runtime.listed, runtime.heads_q, runtime.heads_kv)
    return packed if agree and packed & (packed - 1) == 0 else 1


def tile_positions(block_q: int, packed: int) -> int:
    """Return how many query positions a tile has whose heads are packed."""
    return max(1, block_q // packed)


def _blocks_seen(problem: Problem, runtime: Runtime, kernel: _FwdKernel) -> int:
    """Key blocks that a query tile visits, where all sequences are alike."""
    num_blocks = -(-runtime.len_kv // kernel.block_kv)
    if problem.mask is MaskKind.LOCAL_STRIDE:
        local, stride = runtime.score_params[_LOCAL : _LOCAL + 2]
        size = 1 << int(runtime.score_params[_LOCAL + 5])
        per_block = size // kernel.block_kv
        return min(num_blocks, int((local + 3) * per_block + num_blocks // stride))
    if problem.mask is not MaskKind.WINDOW:
        return num_blocks
    left, keep_first = runtime.score_params[_LEFT : _LEFT + 2]
    if left <= NO_LEFT:
        return num_blocks
    reach = min(runtime.diagonal, runtime.len_kv) - left + min(runtime.len_q, kernel.block_q)
    return min(num_blocks, int(reach // kernel.block_kv + 2 - (-keep_first // kernel.block_kv)))


def _load(problem: Problem, rows: RowClass, device_index: int) -> _FwdKernel:
    here = device(device_index)
    if not backend.active.is_capturing():
        workspace.prepare(device_index)
    spec = fwd_spec(problem, here.arch, rows)
    kernel = loaded_kernel(spec, device_index)
    num_slots = here.num_sms * kernel.blocks_per_sm
    return _FwdKernel(kernel, spec.tile.block_q, spec.tile.block_kv, num_slots)


def _run_cuda(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, runtime: Runtime, call: Call
) -> Tensor | tuple[Tensor, Tensor]:
    check_cuda()
    # Rows that belong to no sequence are written by no kernel.
    is_sparse = problem.q_layout is not SeqLayout.BATCHED
    out, lse = call.out, None
    if out is None:
        shape = (*q.shape[:-1], problem.head_dim_v)
        out = (q.new_zeros if is_sparse else q.new_empty)(shape, dtype=call.out_dtype)
    if call.return_lse:
        shape = lse_shape(q, runtime)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        if is_sparse:
            lse.fill_(float("-inf"))
    if runtime.batch * runtime.heads_q * runtime.len_q:
        device_index = q.get_device()
        if device_index == backend.active.current_device():
            _launch(q, k, v, out, lse, problem, runtime, call, device_index)
        else:
            with backend.active.on_device(device_index):
                _launch(q, k, v, out, lse, problem, runtime, call, device_index)
    return out if lse is None else (out, lse)


def is_followed(*tensors: Tensor | None) -> bool:
    """Whether autograd follows an operation on these tensors.

    Raises
    ------
    UnsupportedError
        One of them is a dual number.
    """
    if forward_ad._current_level >= 0 and has_duals(tensors):
        raise UnsupportedError(NO_FORWARD_MODE)
    wants = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return wants and torch.is_grad_enabled()


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


def lse_shape(q: Tensor, runtime: Runtime) -> tuple[int, ...]:
    """Return the shape of the LSE: [B, Hq, Lq], or [Hq, total] where q is flat."""
    indices = runtime.indices
    if indices is None:
        return runtime.batch, runtime.heads_q, runtime.len_q
    if indices.is_flat:
        return runtime.heads_q, q.shape[0]
    return (
        runtime.batch,
        runtime.heads_q,
        q.numel() // max(1, runtime.batch * runtime.heads_q * q.shape[-1]),
    )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    problem: Problem,
    runtime: Runtime,
    call: Call,
    device_index: int,
) -> None:
    prepared = prepare(q, k, v, problem, runtime, call, device_index)
    if prepared is not None:
        q, k, v, problem, runtime = prepared[:5]
    kernel, _, packed, num_q_tiles, splits, num_slots, num_ctas, block_q = plan(
        problem, runtime, device_index, call.num_splits, call.tile_rows
    )
    stream = backend.active.stream(device_index)
    batch, len_q, heads_q = runtime.batch, runtime.len_q, runtime.heads_q
    indices = runtime.indices
    is_flat = indices is not None and indices.is_flat
    stride = out.stride()
    if is_flat:
        out_strides = (0, stride[0], stride[1])
    elif call.layout == "bshd":
        out_strides = (stride[0], stride[1], stride[2])
    else:
        out_strides = (stride[0], stride[2], stride[1])
    lse_ptr, lse_strides = 0, (0, 0)
    if lse is not None:
        stride = lse.stride()
        lse_ptr, lse_strides = lse.data_ptr(), (0, stride[0])
        if not is_flat:
            lse_strides = (stride[0], stride[1])
    partial_out_ptr = partial_lse_ptr = arrivals_ptr = 0
    if splits != 1:
        # One allocation for both: values of every item, and after them their LSEs.
        num_rows = num_ctas * block_q
        values = num_rows * problem.head_dim_v
        partial = torch.empty(values + num_rows, dtype=torch.float32, device=q.device)
        partial_out_ptr = partial.data_ptr()
        partial_lse_ptr = partial_out_ptr + 4 * values
        arrivals_ptr = arrivals(num_ctas, device_index, stream)
    kernel.launch(
        num_ctas,
        stream,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse_ptr,
        partial_out_ptr,
        partial_lse_ptr,
        arrivals_ptr,
        *runtime.q_strides,
        *runtime.k_strides,
        *runtime.v_strides,
        *out_strides,
        *lse_strides,
        batch,
        len_q,
        runtime.len_kv,
        heads_q,
        heads_q // runtime.heads_kv,
        packed,
        num_q_tiles,
        splits,
        num_slots,
        runtime.diagonal,
        runtime.scale < 0,
        *divisor(packed),
        (abs(runtime.scale) or _TINY_SCALE) * _LOG2_E,
        *_tail(runtime),
        *_lists(runtime, q, block_q, packed),
        *(prepared.scale_params if prepared is not None else ()),
    )
    if lse is not None and prepared is not None and prepared.along_mean is not None:
        lse.add_(prepared.along_mean.view(lse.shape), alpha=runtime.scale)


def _tail(runtime: Runtime) -> tuple[float, ...]:
    """Return what follows the fields that every kernel has."""
    indices, scores = runtime.indices, runtime.score_params
    if indices is None:
        return (*_NO_SEQUENCES, *scores) if scores else ()
    return (*indices.addresses, indices.bottom_right, *indices.counts, *scores)


def _lists(runtime: Runtime, q: Tensor, block_q: int, packed: int) -> tuple[int, ...]:
    """Return the fields of `FwdListParams`."""
    rule = runtime.listed
    if rule is None:
        return ()
    positions = tile_positions(block_q, packed)
    first_row = runtime.diagonal
    longest = max(runtime.len_kv, first_row + runtime.len_q)
    heads = (runtime.heads_q, runtime.heads_kv)
    return (*lists.lists_of(rule, heads, longest, positions, q.device).params, positions - 1, 0)


def specs_of_problem(problem: Problem, arch: str) -> list[KernelSpec]:
    """Return every kernel that calls with this problem can need, whatever their lengths."""
    return list(dict.fromkeys(fwd_spec(problem, arch, rows) for rows in RowClass))


def forget_kernels() -> None:
    """Forget the loaded kernels of calls: with another backend, in a forked child, in tests."""
    _fwd_kernels.clear()
    launch.unload_all()


backend.on_change(forget_kernels)

"""The backward pass on a GPU: row statistics, then dK, dV and the sums of dQ, then dQ.

Memory beside the results: LSE and delta in fp32 (8 bytes a row and head, 16 with sinks), and the
sums of dQ in fp32 (4 bytes an element of q, rounded up to whole tiles); where the kernel takes fp32
as fp16 parts (halves.py), as much again as q, k, v and dO; where dK and dV come in parts
(kv_parts.py), 4 bytes an element of these for each part. No tensor is Lq x Lkv.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import UnsupportedError
from jitattn.jit import backend
from jitattn.jit.device import device
from jitattn.jit.get_kernel import loaded_kernel
from jitattn.kernels.bwd_tiles import bwd_spec, dq_spec, score_grad_spec, specs_of_backward
from jitattn.request.layouts import parse
from jitattn.request.problem import is_deterministic
from jitattn.run import kv_parts
from jitattn.run import split_fp32 as halves
from jitattn.run.backward_pass import Pass, Rows
from jitattn.run.score_gradients import score_gradients, target_of
from jitattn.spec.enums import Access, MaskKind, Numerics, ScoreTarget, SeqLayout
from jitattn.spec.kernel_spec import RoundSpec, StatsSpec, padded_head_dim
from jitattn.values.masks import LocalStride
from jitattn.values.sequences import overlaps
from jitattn.values.tensors import DTYPES, readable

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from jitattn.request.problem import Call, Runtime
    from jitattn.request.scores import Scores
    from jitattn.spec.kernel_spec import BwdSpec, KernelSpec, Problem
    from jitattn.values.masks import Rule

#: Blocks of local + stride patterns whose keys the kernel gathers.
_FINE_BLOCKS: Final = (16, 32)
#: Largest dS, and dO, that fp16 operands are scaled to, as a power of two.
_LARGEST_FP16_LOG2: Final = 15.0


class Gradients(NamedTuple):
    """What a backward pass gives; `None` where nothing was asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


def settle_overlaps(call: Call) -> None:
    """Find out whether sequences of keys overlap, once for the life of their value."""
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
        Which of bias, relative_bias, alibi_slopes and sinks need gradients.

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
    problem, runtime = parse(q, k, v, call._replace(out=None))
    out, lse = readable("out", out), readable("lse", lse)
    d_out = readable("the gradient of out", d_out)
    d_lse = None if d_lse is None else readable("the gradient of the LSE", d_lse)
    row_axis, head_axis = 0, 1
    if q.dim() == 4:
        row_axis, head_axis = (1, 2) if call.layout == "bshd" else (2, 1)
    batch = q.shape[0] if row_axis else 1
    rows = Rows(batch, q.shape[row_axis], q.shape[head_axis], head_axis, row_axis)
    dense = torch.contiguous_format
    sizes = (runtime.batch, runtime.len_q, runtime.len_kv, q.numel(), k.numel(), v.numel())
    is_empty = 0 in sizes
    is_sparse = is_empty or problem.kv_layout is not SeqLayout.BATCHED
    like = torch.zeros_like if is_sparse else torch.empty_like
    dk, dv = like(k, memory_format=dense), like(v, memory_format=dense)
    dq = (torch.zeros_like if is_empty else torch.empty_like)(q, memory_format=dense)
    found = Gradients(dq, dk, dv)
    with backend.active.on_device(q.get_device()):
        if is_empty:
            zeros = {
                name: torch.zeros_like(getattr(call.scores, name), memory_format=dense)
                for name in wanted
            }
            return found._replace(**zeros)
        d_out_scale = _scale_of_d_out(q, v, d_out, d_lse, call)
        stats = _row_stats(rows, out, lse, d_out, d_lse, d_out_scale, problem, call)
        d_out = d_out.to(q.dtype) if d_out_scale is None else (d_out * d_out_scale[0]).to(q.dtype)
        needs_copy = d_out.stride(-1) != 1 and d_out.shape[-1] > 1
        if needs_copy or (problem.access is Access.VEC16 and not _aligned(d_out)):
            d_out = d_out.clone(memory_format=dense)  # contiguous() would keep an odd address
        index = q.get_device()
        stream = backend.active.stream(index)
        arch = device(index).arch
        whole = Pass(
            q,
            k,
            v,
            d_out,
            stats,
            problem,
            runtime,
            call,
            rows,
            arch,
            index,
            stream,
            rows.strides(d_out),
            d_out_scale,
        )
        _main(whole, dq, dk, dv)
        others = score_gradients(whole, wanted)
    return found._replace(dk=-dk if negated else dk, **others)


def _scale_of_d_out(
    q: Tensor, v: Tensor, d_out: Tensor, d_lse: Tensor | None, call: Call
) -> Tensor | None:
    """Return a power of two by which dO and dS fit fp16, and its inverse, on the device.

    Gradients of fp32 results may be of any size. |dS| is at most |dP| + |delta|, and both products
    of rows of dO with v, or means of its rows, at most |dO| |v|. Rows that are not finite count for
    nothing here: they reach the gradients that depend on them in any case.
    """
    if q.dtype is not torch.float16 or (d_out.dtype is torch.float16 and d_lse is None):
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


def kernel_problem(problem: Problem, runtime: Runtime, arch: str) -> Problem:
    """Return the problem of the kernel for dq, dk and dv of a call."""
    own = without_lists(problem, runtime.listed, arch)
    if own is not problem:
        return own
    return halves.backward_problem_of(problem, runtime) or problem


def without_lists(problem: Problem, rule: Rule | None, arch: str) -> Problem:
    """Return that of lists of `rule`; small blocks of a causal local + stride need no lists."""
    if not (isinstance(rule, LocalStride) and rule.causal and rule.block_size in _FINE_BLOCKS):
        return problem
    whole = replace(problem, mask=MaskKind.LOCAL_STRIDE)
    if bwd_spec(whole, arch).tile.block_kv <= rule.block_size:
        return whole
    return replace(problem, mask=MaskKind.FINE_STRIDE)


def specs_of_gradients(
    problem: Problem, rule: Rule | None, scores: Scores, arch: str, *, deterministic: bool
) -> list[KernelSpec]:
    """Return every kernel that the backward pass of a call can need; `rule`: what is listed."""
    own = without_lists(problem, rule, arch)
    specs = specs_of_backward(own, arch, deterministic=deterministic)
    targets = [] if scores.bias is None else [target_of(scores.bias)]
    if scores.relative_bias is not None or scores.alibi_slopes is not None:
        targets.append(ScoreTarget.DISTANCE)
    return [*specs, *(score_grad_spec(problem, arch, target) for target in targets)]


def _aligned(tensor: Tensor) -> bool:
    units = tensor.data_ptr() | tensor.shape[-1] * tensor.element_size()
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size > 1:
            units |= stride * tensor.element_size()
    return units & 15 == 0


def _row_stats(
    rows: Rows,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    d_out_scale: Tensor | None,
    problem: Problem,
    call: Call,
) -> Tensor:
    """Return the statistics of every row, [2 or, with sinks, 4, B, Hq, Lq].

    They are LSE in base 2, delta, the part of the weights that a sink leaves, and what the row adds
    to dsinks.
    """
    index = out.get_device()
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        out = out.contiguous()
    d_out = d_out.to(out.dtype)
    if d_out.stride(-1) != 1 and d_out.shape[-1] > 1:
        d_out = d_out.contiguous()
    spec = StatsSpec(
        dtype=DTYPES[out.dtype],
        head_dim_v=problem.head_dim_v,
        access=Access.VEC16 if _aligned(out) and _aligned(d_out) else Access.ELEMENT,
        arch=device(index).arch,
    )
    sinks = call.scores.sinks
    stats = out.new_empty(
        (2 if sinks is None else 4, rows.batch, rows.heads, rows.length), dtype=torch.float32
    )
    num_rows = rows.batch * rows.heads * rows.length
    loaded_kernel(spec, index).launch(
        -(-num_rows * spec.lanes // spec.num_threads),
        backend.active.stream(index),
        out.data_ptr(),
        d_out.data_ptr(),
        lse.data_ptr(),
        0 if d_lse is None else d_lse.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        0 if d_out_scale is None else d_out_scale.data_ptr(),
        stats[0].data_ptr(),
        stats[1].data_ptr(),
        0 if sinks is None else stats[2].data_ptr(),
        0 if sinks is None else stats[3].data_ptr(),
        *rows.strides(out),
        *rows.strides(d_out),
        *rows.stat_strides(lse),
        *((0, 0, 0) if d_lse is None else rows.stat_strides(d_lse)),
        num_rows,
        rows.length,
        rows.heads,
    )
    return stats


def _main(whole: Pass, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Compute dq, dk and dv."""
    runtime, call = whole.runtime, whole.call
    problem = kernel_problem(whole.problem, runtime, whole.arch)
    if problem.mask is not whole.problem.mask:  # without lists, whose sequences count as different
        corner = runtime.len_kv - runtime.len_q if problem.is_uniform else 0
        runtime = runtime._replace(diagonal=corner, listed=None)
        whole = whole._replace(problem=problem, runtime=runtime)
    deterministic = is_deterministic(call)
    spec = bwd_spec(problem, whole.arch, deterministic=deterministic)
    dq_sum, strides = _room_for_dq(whole, spec, dq)
    turns = None
    if deterministic:
        heads = runtime.batch * runtime.heads_q
        num_q_tiles, _ = whole.num_tiles(problem, spec.tile)
        turns = torch.zeros(heads * num_q_tiles, dtype=torch.int32, device=dq.device)
    ours = whole.in_halves(problem) if problem.numerics is Numerics.F16X3 else whole
    _launch_main(ours, spec, dq_sum, strides, (dk, dv), turns)
    _round_dq(whole, spec, dq_sum, strides, dq)


def _room_for_dq(whole: Pass, spec: BwdSpec, dq: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return zeros for the sums of dQ, and their strides."""
    if spec.in_fragments:
        num_q_tiles, _ = whole.num_tiles(spec.problem, spec.tile)
        per_head = num_q_tiles * spec.tile.block_q * spec.dq_columns
        heads = whole.runtime.heads_q
        dq_sum = dq.new_zeros(whole.runtime.batch * heads * per_head, dtype=torch.float32)
        return dq_sum, (heads * per_head, 0, per_head)
    dq_sum = torch.zeros(dq.shape, dtype=torch.float32, device=dq.device)
    return dq_sum, whole.rows.strides(dq_sum)


def _launch_main(
    whole: Pass,
    spec: BwdSpec,
    dq_sum: Tensor,
    strides: tuple[int, int, int],
    gradients: tuple[Tensor, Tensor],
    turns: Tensor | None,
) -> None:
    """Launch the kernel for the sums of dQ, dK and dV, and what adds up parts of the latter."""
    runtime, call = whole.runtime, whole.call
    tiles = whole.num_tiles(spec.problem, spec.tile)
    here = device(whole.device_index)
    kernel = loaded_kernel(spec, whole.device_index)
    split = kv_parts.choose_split(
        spec,
        here.num_sms * kernel.blocks_per_sm,
        runtime,
        tiles,
        is_fixed=call.num_splits is not None,
    )
    is_plain = split.num_ctas == split.num_launches == 1 and not kv_parts.shares_rows(call)
    if is_plain:
        targets = [kv_parts.plain_target(gradient, call) for gradient in gradients]
    else:
        targets = [
            kv_parts.parts_target(gradient, split, spec.problem, runtime, call)
            for gradient in gradients
        ]
    in_parts = 0 if is_plain else 1 if split.num_launches == 1 else 2
    for idx in range(split.num_launches):
        first = idx * split.tiles_per_launch
        whole.launch(
            spec,
            tiles[1] * runtime.heads_kv * runtime.batch * split.num_ctas,
            dq_sum,
            strides,
            (targets[0], targets[1]),
            turns,
            num_q_splits=split.num_ctas,
            in_parts=in_parts,
            q_tiles=(first, min(first + split.tiles_per_launch, 2**31 - 1)),
        )
    if is_plain:
        return
    of_dv = 1.0 if call.scores.dropout is None else call.scores.dropout.scale
    for target, gradient, scale in zip(targets, gradients, (whole.scale, of_dv), strict=True):
        kv_parts.combine(target, gradient, scale, whole.scale_address(1), runtime, call, whole.arch)


def _round_dq(
    whole: Pass, spec: BwdSpec, dq_sum: Tensor, strides: tuple[int, int, int], dq: Tensor
) -> None:
    """Launch the kernel that makes dQ of its sums."""
    rows = whole.rows
    num_rows = rows.batch * rows.length * rows.heads
    rounding = dq_spec(spec)
    kernel = loaded_kernel(rounding, whole.device_index)
    operands = (dq_sum.data_ptr(), dq.data_ptr(), whole.scale_address(1))
    if not isinstance(rounding, RoundSpec):
        kernel.launch(
            -(-num_rows * -(-spec.problem.head_dim // 4) // rounding.num_threads),
            whole.stream,
            *operands,
            0,
            *strides,
            *rows.strides(dq),
            num_rows,
            rows.length,
            rows.heads,
            1,
            whole.scale,
        )
        return
    runtime, tile = whole.runtime, spec.tile
    num_q_tiles, _ = whole.num_tiles(spec.problem, tile)
    first_position = 0
    if runtime.listed is not None:  # tiles begin where lists do
        corner = runtime.diagonal
        if runtime.indices is not None and runtime.indices.bottom_right:
            corner += runtime.len_kv - runtime.len_q
        first_position = corner & (tile.block_q - 1)
    columns = padded_head_dim(spec.problem.head_dim) // rounding.column_tiles
    heads = runtime.batch * runtime.heads_q
    num_threads = heads * num_q_tiles * tile.block_q * columns // 4
    kernel.launch(
        -(-num_threads // rounding.num_threads),
        whole.stream,
        *operands,
        strides[0],
        strides[2],
        *rows.strides(dq),
        num_rows,
        rows.length,
        rows.heads,
        whole.scale,
        first_position,
    )

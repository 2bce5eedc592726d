"""Plans the backward pass: preprocess rows, compute dK, dV and fp32 sums of dQ, postprocess dQ.

Workspace: LSE and delta in fp32 (8 bytes a row and head, 16 with sinks), and the
sums of dQ in fp32 (4 bytes an element of q, rounded up to whole tiles); where the kernel takes fp32
as fp16 parts (prepare.py), as much again as q, k, v and dO; where dK and dV come in parts
(kv_parts.py), 4 bytes an element of these for each part. No tensor is Lq x Lkv.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.kernels.bwd import bwd_spec
from jitattn.kernels.bwd_captured import CapturedGradSpec
from jitattn.kernels.bwd_scores import ScoreGradSpec
from jitattn.kernels.bwd_sm90 import BwdSm90Spec
from jitattn.plan import arguments, kv_parts, prepare, wgmma_backward
from jitattn.plan.backward_pass import BackwardPass, launch
from jitattn.plan.dq import postprocess, room_for_dq
from jitattn.plan.preprocess import preprocess
from jitattn.plan.score_gradients import (
    bias_gradient,
    captured_gradients,
    distance_gradient,
    wanted_sums,
)
from jitattn.plan.step import Buffer, Place, Plan, Step
from jitattn.spec.enums import MaskKind, Numerics, Switch
from jitattn.values.masks import LocalStride

if TYPE_CHECKING:
    from jitattn.kernels.bwd import BwdSpec
    from jitattn.plan.backward_pass import BackwardOperands
    from jitattn.plan.step import Device
    from jitattn.request.problem import Runtime, Strides
    from jitattn.spec.kernel_spec import Problem
    from jitattn.values.masks import Rule

#: Blocks of local + stride patterns whose keys the kernel gathers.
_FINE_BLOCKS: Final = (16, 32)


class Backward(NamedTuple):
    """The plan of a backward pass, with the facts that `run` needs."""

    plan: Plan
    longest_listed: int  #: positions that block lists cover; 0 where there are none
    tile_positions: frozenset[int]  #: that need block lists
    needs_entries: bool  #: of the block table, in the order of pages
    bias_differs: bool  #: each sequence has its own bias gradient


def backward(
    problem: Problem, runtime: Runtime, operands: BackwardOperands, device: Device
) -> Backward:
    """Plan a backward pass with at least one row and one key.

    Parameters
    ----------
    problem, runtime : Problem, Runtime
        As the call was parsed, with a scale that is not negative.
    operands : BackwardOperands
    device : Device

    Raises
    ------
    LaunchError
        A kernel is not loaded and the stream is capturing a graph.
    UnsupportedError
        The call needs more CTAs than a grid has.
    """
    whole = BackwardPass(problem, runtime, operands, device)
    heads, num_stats = runtime.heads_q, 4 if problem.sinks is Switch.ON else 2
    shape = (num_stats, operands.batch, heads, operands.length)
    buffers = {"stats": Buffer(shape, "fp32")}
    positions = set()

    main, spec, main_buffers = _main(whole)
    steps = [preprocess(whole, folds_sinks=isinstance(spec, BwdSm90Spec)), *main]
    buffers |= main_buffers
    is_listed = runtime.listed is not None
    if spec.problem.mask is MaskKind.BLOCK_LISTS:
        positions.add(spec.tile.block_q)
    differs = False
    if "bias" in operands.wanted and operands.bias_shape is not None:
        step, buffers["d_bias"], differs = bias_gradient(whole, operands.bias_shape)
        steps.append(step)
    if "relative_bias" in operands.wanted or "alibi_slopes" in operands.wanted:
        step, buffers["by_distance"] = distance_gradient(whole)
        steps.append(step)
    captured = wanted_sums(problem, operands.wanted)
    if captured:
        more, more_buffers = captured_gradients(whole, captured)
        steps += more
        buffers |= more_buffers
    if is_listed:
        square = (ScoreGradSpec, CapturedGradSpec)
        specs = [step.spec for step in steps]
        positions |= {spec.tile.block_q for spec in specs if isinstance(spec, square)}
    longest = max(runtime.len_kv, runtime.diagonal + runtime.len_q) if is_listed else 0
    return Backward(
        Plan(tuple(steps), buffers),
        longest,
        frozenset(positions),
        runtime.shares_rows,
        differs,
    )


def kernel_problem(problem: Problem, runtime: Runtime, arch: str) -> Problem:
    """Return the problem of the kernel that computes dq, dk and dv."""
    own = without_block_lists(problem, runtime.listed, arch)
    if own is not problem:
        return own
    return prepare.backward_kernel_problem(problem, runtime) or problem


def without_block_lists(problem: Problem, rule: Rule | None, arch: str) -> Problem:
    """Replace block lists by a local + stride mask where the kernel computes `rule` directly."""
    if not (isinstance(rule, LocalStride) and rule.causal and rule.block_size in _FINE_BLOCKS):
        return problem
    whole = replace(problem, mask=MaskKind.LOCAL_STRIDE)
    if bwd_spec(whole, arch).tile.block_kv <= rule.block_size:
        return whole
    return replace(problem, mask=MaskKind.FINE_STRIDE)


def main_spec(
    problem: Problem,
    runtime: Runtime,
    device: Device,
    d_out_strides: Strides | None = None,
    *,
    deterministic: bool,
    has_d_lse: bool = False,
) -> BwdSpec | BwdSm90Spec:
    """Return the kernel that computes dq, dk and dv, of a problem as `kernel_problem` has it.

    The other arguments are those of `wgmma_backward.choice`.
    """
    chosen = wgmma_backward.choice(
        problem,
        runtime,
        device,
        d_out_strides,
        deterministic=deterministic,
        has_d_lse=has_d_lse,
    )
    return chosen.spec or bwd_spec(problem, device.arch, deterministic=deterministic)


def _main(
    whole: BackwardPass,
) -> tuple[list[Step], BwdSpec | BwdSm90Spec, dict[str, Buffer]]:
    """Plan the launches that compute dq, dk and dv."""
    runtime, operands, device = whole.runtime, whole.operands, whole.device
    problem = kernel_problem(whole.problem, runtime, device.arch)
    if problem.mask is not whole.problem.mask:  # block lists count all sequences as different
        corner = runtime.len_kv - runtime.len_q if problem.is_uniform else 0
        runtime = runtime._replace(diagonal=corner, listed=None)
        whole = whole._replace(problem=problem, runtime=runtime)
    spec = main_spec(
        problem,
        runtime,
        device,
        operands.main_d_out_strides,
        deterministic=operands.deterministic,
        has_d_lse=operands.d_lse_strides is not None,
    )
    num_q_tiles, _ = tiles = whole.num_tiles(problem, spec.tile)
    buffers: dict[str, Buffer] = {}
    buffers["dq_sum"], dq_strides = room_for_dq(whole, spec)
    if operands.deterministic:
        count = runtime.batch * runtime.heads_q * num_q_tiles
        buffers["dq_semaphore"] = Buffer((count,), "int32", is_zeroed=True)
    steps: list[Step] = []
    ours = whole
    if problem.numerics is Numerics.F16X3:
        prepared = prepare.split(problem, runtime, device.arch, operands.main_d_out_strides)
        steps += prepared.plan.steps
        buffers |= prepared.plan.buffers
        ours = whole._replace(runtime=prepared.runtime, prepared=prepared)
    split = kv_parts.choose_split(
        spec, device.slots(spec), runtime, tiles, is_fixed=operands.num_splits is not None
    )
    is_plain = split.num_ctas == split.num_launches == 1 and not runtime.shares_rows
    gradients = (operands.dk, operands.dv)
    targets = [
        kv_parts.plain_target(gradient)
        if is_plain
        else kv_parts.parts_target(gradient, split, spec.problem, runtime)
        for gradient in gradients
    ]
    num_ctas = tiles[1] * runtime.heads_kv * runtime.batch * split.num_ctas
    for idx in range(split.num_launches):
        first = idx * split.tiles_per_launch
        changes = {
            "num_q_splits": split.num_ctas,
            "in_parts": 0 if is_plain else 1 if split.num_launches == 1 else 2,
            "first_q_tile": first,
            "end_q_tile": min(first + split.tiles_per_launch, kv_parts.ALL_TILES),
        }
        steps.append(
            launch(
                ours, spec, num_ctas, Place("dq_sum"), dq_strides, (targets[0], targets[1]), changes
            )
        )
    if not is_plain:
        scales = (arguments.positive_scale(runtime), operands.dropout_scale)
        unscale = Place("d_out_scale", 4) if operands.has_scale else None
        for target, gradient, scale in zip(targets, gradients, scales, strict=True):
            if target.parts is not None:
                buffers[target.place.name] = target.parts
            steps.append(
                kv_parts.combine(
                    target, gradient, scale, unscale, runtime, problem.dtype, device.arch
                )
            )
    steps.append(postprocess(whole, spec, dq_strides))
    return steps, spec, buffers

"""Plans the gradients of biases, relative biases and ALiBi slopes in a backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jitattn.kernels.bwd_scores import score_grad_spec
from jitattn.plan.backward_pass import launch
from jitattn.plan.step import Buffer, Place, Step
from jitattn.spec.enums import ScoreTarget, SeqLayout

if TYPE_CHECKING:
    from jitattn.plan.backward_pass import BackwardPass


def target_of(bias_shape: tuple[int, ...]) -> ScoreTarget:
    """Return the gradient kernel's target: a bias row per query, or one broadcast row."""
    return ScoreTarget.MATRIX if bias_shape[2] > 1 else ScoreTarget.ROW


def bias_gradient(whole: BackwardPass, bias_shape: tuple[int, ...]) -> tuple[Step, Buffer, bool]:
    """Plan the gradient of a bias: launch, buffer, and whether each sequence has its own."""
    runtime, dtype = whole.runtime, whole.operands.bias_dtype
    target = target_of(bias_shape)
    spec = score_grad_spec(whole.problem, whole.device.arch, target)
    num_q_tiles, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    batch, heads, rows, columns = bias_shape
    # With block lists tiles begin at different rows in each sequence: each needs its own gradient.
    differs = runtime.listed is not None and target is ScoreTarget.MATRIX
    differs &= batch == 1 < runtime.batch and whole.problem.q_layout is not SeqLayout.BATCHED
    if differs:
        batch = runtime.batch
    num_ctas = num_kv_tiles * batch * heads
    if target is ScoreTarget.MATRIX:
        num_ctas *= num_q_tiles
    strides = (heads * rows * columns, columns, rows * columns)
    targets = {"target_batch": batch, "target_heads": heads}
    step = launch(whole, spec, num_ctas, Place("d_bias"), strides, None, targets)
    return step, Buffer((batch, heads, rows, columns), dtype, is_zeroed=True), differs


def distance_gradient(whole: BackwardPass) -> tuple[Step, Buffer]:
    """Plan the sums of dS by distance key - query + Lkv, [2, B, Hq, Lq + Lkv]."""
    runtime = whole.runtime
    spec = score_grad_spec(whole.problem, whole.device.arch, ScoreTarget.DISTANCE)
    num_q_tiles, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    batch, heads = runtime.batch, runtime.heads_q
    num_ctas = (num_q_tiles + num_kv_tiles - 1) * batch * heads
    targets = {"target_batch": batch, "target_heads": heads}
    step = launch(whole, spec, num_ctas, Place("by_distance"), (0, 0, 0), None, targets)
    return step, Buffer((2, batch, heads, runtime.len_q + runtime.len_kv), "fp32", is_zeroed=True)

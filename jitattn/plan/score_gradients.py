"""Plans the gradients of biases, relative biases, ALiBi slopes and captured tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from jitattn.kernels.bwd_captured import captured_grad_spec
from jitattn.kernels.bwd_scores import score_grad_spec
from jitattn.plan.backward_pass import launch
from jitattn.plan.step import Buffer, Place, Step
from jitattn.spec.call_arguments import captured_numbers
from jitattn.spec.derivative import differentiable_tensors
from jitattn.spec.enums import ScoreTarget, SeqLayout
from jitattn.spec.program import parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jitattn.plan.backward_pass import BackwardPass
    from jitattn.request.problem import Runtime
    from jitattn.spec.kernel_spec import Problem
    from jitattn.spec.program import Program


#: Sums of captured tensors are below 2 to this power; beyond is what is no number.
SUM_BITS: Final = 61


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


def captured_gradients(
    whole: BackwardPass, wanted: Sequence[int]
) -> tuple[list[Step], dict[str, Buffer]]:
    """Plan the sums of captured tensors, by their numbers, in order: measured first, then added.

    The sums are integers, in units that follow from what was measured
    (`run/captured_gradients.py`).
    """
    runtime = whole.runtime
    spec = captured_grad_spec(whole.problem, whole.device.arch)
    _, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    num_ctas = num_kv_tiles * runtime.batch * runtime.heads_q
    bits = sum(1 << idx for idx in wanted)
    numbers: dict[str, float] = {
        "captured_wanted": bits - (1 << 32 if bits >> 31 else 0),  # as int32
        "captured_bits": captured_bits(whole.problem, runtime),
    }
    step = launch(whole, spec, num_ctas, None, (0, 0, 0), None, numbers)
    places = {**step.places, "captured_most": Place("captured_most")}
    steps = [
        step._replace(numbers={**step.numbers, "captured_sums": 0}, places=places),
        step._replace(places={**places, "captured_sums": Place("captured_sums")}),
    ]
    program = parse(whole.problem.function)
    sizes = [math.prod(captured_shape(runtime, program, idx)) for idx in wanted]
    return steps, {
        "captured_most": Buffer((len(program.tensors),), "int32", is_zeroed=True),
        "captured_sums": Buffer((sum(sizes),), "int64", is_zeroed=True),
    }


def wanted_sums(problem: Problem, wanted: Iterable[str]) -> list[int]:
    """Return the numbers of the captured tensors that are wanted and have a gradient, in order."""
    numbers = captured_numbers(wanted)
    if not numbers:
        return []
    found = differentiable_tensors(parse(problem.function))
    return [idx for idx in numbers if idx in found]


def captured_shape(runtime: Runtime, program: Program, idx: int) -> tuple[int, ...]:
    """Return the shape of a captured tensor."""
    found = dict(runtime.function or ())
    return tuple(int(found[f"tensor{idx}_size_{axis}"]) for axis in range(program.tensors[idx][1]))


def captured_bits(problem: Problem, runtime: Runtime) -> int:
    """Return k: contributions of all pairs, below 2^k each, sum up to less than 2^SUM_BITS."""
    reads = sum(node.op == "read" for node in parse(problem.function).nodes)
    pairs = runtime.batch * runtime.heads_q * runtime.len_q * runtime.len_kv
    return SUM_BITS - (max(1, reads * pairs) - 1).bit_length()

"""The plan of a backward pass: preprocess rows, then dK, dV and the sums of dQ, then dQ.

Memory beside the results: LSE and delta in fp32 (8 bytes a row and head, 16 with sinks), and the
sums of dQ in fp32 (4 bytes an element of q, rounded up to whole tiles); where the kernel takes fp32
as fp16 parts (prepare.py), as much again as q, k, v and dO; where dK and dV come in parts
(kv_parts.py), 4 bytes an element of these for each part. No tensor is Lq x Lkv.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.errors import UnsupportedError
from jitattn.jit.launch import MAX_GRID
from jitattn.kernels.bwd import bwd_spec, dq_spec, specs_of_backward
from jitattn.kernels.bwd_scores import ScoreGradSpec, score_grad_spec
from jitattn.kernels.round import RoundSpec
from jitattn.kernels.stats import StatsSpec
from jitattn.plan import arguments, kv_parts, prepare
from jitattn.plan.step import Buffer, Place, Plan, Step
from jitattn.spec.enums import Access, MaskKind, Numerics, ScoreTarget, SeqLayout, Switch
from jitattn.spec.kernel_spec import padded_head_dim
from jitattn.values.masks import LocalStride

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from jitattn.kernels.bwd import BwdSpec
    from jitattn.kernels.bwd_tiles import BwdTile
    from jitattn.plan.kv_parts import KvGradient, KvTarget
    from jitattn.plan.prepare import Prepared
    from jitattn.plan.step import Device
    from jitattn.request.problem import Runtime, Strides
    from jitattn.spec.kernel_spec import KernelSpec, Problem
    from jitattn.values.masks import Rule

#: Blocks of local + stride patterns whose keys the kernel gathers.
_FINE_BLOCKS: Final = (16, 32)


class BackwardOperands(NamedTuple):
    """Facts of the tensors of a backward pass. Strides are (batch, row, head), or as said."""

    batch: int  #: of q: 1 where it is flat
    length: int  #: rows of q
    is_flat: bool  #: q is [total, Hq, D]
    out_strides: Strides
    d_out_strides: Strides  #: as the preprocess kernel reads it, in the dtype of out
    main_d_out_strides: Strides  #: as the others do: in the dtype of q, scaled
    lse_strides: Strides  #: (batch, head, row)
    d_lse_strides: Strides | None  #: likewise; None: the LSE has no gradient
    is_aligned: bool  #: out and the preprocess kernel's dO, to 16 bytes
    has_scale: bool  #: dO is scaled to fit fp16
    dq_strides: Strides
    dk: KvGradient
    dv: KvGradient
    wanted: tuple[str, ...]  #: bias, relative_bias, alibi_slopes, sinks: those with gradients
    bias_shape: tuple[int, ...] | None
    bias_dtype: str
    dropout_scale: float
    num_splits: int | None
    deterministic: bool


class Backward(NamedTuple):
    """The plan of a backward pass, and what `run` asks of it."""

    plan: Plan
    longest_listed: int  #: positions that block lists cover; 0 where there are none
    tile_positions: frozenset[int]  #: for which lists are needed
    needs_entries: bool  #: of the block table, in the order of pages
    bias_differs: bool  #: the gradient of a bias comes for each sequence


class _Pass(NamedTuple):
    """What the launches of one pass share."""

    problem: Problem
    runtime: Runtime
    operands: BackwardOperands
    device: Device
    prepared: Prepared | None = None  #: fp16 parts of the operands

    def num_tiles(self, problem: Problem, tile: BwdTile) -> tuple[int, int]:
        """Query tiles and key blocks of the longest sequence."""
        len_q = self.runtime.len_q
        if problem.mask is MaskKind.BLOCK_LISTS:
            len_q += tile.block_q - 1  # tiles begin where lists do
        num_kv_tiles = -(-self.runtime.len_kv // tile.block_kv)
        if problem.mask is MaskKind.FINE_STRIDE:
            num_kv_tiles += 1  # either kind of keys may leave a block half empty
        return -(-len_q // tile.block_q), num_kv_tiles


def backward(
    problem: Problem, runtime: Runtime, operands: BackwardOperands, device: Device
) -> Backward:
    """Return the plan of a backward pass with at least one row and one key.

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
    whole = _Pass(problem, runtime, operands, device)
    steps = [_preprocess(whole)]
    heads, num_stats = runtime.heads_q, 4 if problem.sinks is Switch.ON else 2
    shape = (num_stats, operands.batch, heads, operands.length)
    buffers = {"stats": Buffer(shape, "fp32")}
    positions = set()

    main, spec, main_buffers = _main(whole)
    steps += main
    buffers |= main_buffers
    is_listed = runtime.listed is not None
    if spec.problem.mask is MaskKind.BLOCK_LISTS:
        positions.add(spec.tile.block_q)
    differs = False
    if "bias" in operands.wanted and operands.bias_shape is not None:
        step, buffers["d_bias"], differs = _bias_gradient(whole, operands.bias_shape)
        steps.append(step)
    if "relative_bias" in operands.wanted or "alibi_slopes" in operands.wanted:
        step, buffers["by_distance"] = _by_distance(whole)
        steps.append(step)
    if is_listed:
        specs = [step.spec for step in steps]
        positions |= {spec.tile.block_q for spec in specs if isinstance(spec, ScoreGradSpec)}
    longest = max(runtime.len_kv, runtime.diagonal + runtime.len_q) if is_listed else 0
    return Backward(
        Plan(tuple(steps), buffers),
        longest,
        frozenset(positions),
        runtime.shares_rows,
        differs,
    )


def kernel_problem(problem: Problem, runtime: Runtime, arch: str) -> Problem:
    """Return the problem of the kernel for dq, dk and dv of a call."""
    own = without_lists(problem, runtime.listed, arch)
    if own is not problem:
        return own
    return prepare.backward_kernel_problem(problem, runtime) or problem


def without_lists(problem: Problem, rule: Rule | None, arch: str) -> Problem:
    """Return that of lists of `rule`; small blocks of a causal local + stride need no lists."""
    if not (isinstance(rule, LocalStride) and rule.causal and rule.block_size in _FINE_BLOCKS):
        return problem
    whole = replace(problem, mask=MaskKind.LOCAL_STRIDE)
    if bwd_spec(whole, arch).tile.block_kv <= rule.block_size:
        return whole
    return replace(problem, mask=MaskKind.FINE_STRIDE)


def specs_of_gradients(
    problem: Problem,
    rule: Rule | None,
    targets: Collection[ScoreTarget],
    arch: str,
    *,
    deterministic: bool,
) -> list[KernelSpec]:
    """Return every kernel that the backward pass of a call can need.

    Parameters
    ----------
    problem : Problem
    rule : Rule, optional
        What block lists are of.
    targets : collection of ScoreTarget
        Gradients of what is added to scores.
    """
    own = without_lists(problem, rule, arch)
    specs = specs_of_backward(own, arch, deterministic=deterministic)
    return [*specs, *(score_grad_spec(problem, arch, target) for target in targets)]


def target_of(bias_shape: tuple[int, ...]) -> ScoreTarget:
    """Return whether the gradient of a bias has a row for each query, or one for all."""
    return ScoreTarget.MATRIX if bias_shape[2] > 1 else ScoreTarget.ROW


def _preprocess(whole: _Pass) -> Step:
    """Return the launch for the statistics of every row.

    They are LSE in base 2, delta, the part of the weights that a sink leaves, and what the row adds
    to dsinks.
    """
    operands, problem = whole.operands, whole.problem
    spec = StatsSpec(
        dtype=problem.out_dtype,
        head_dim_v=problem.head_dim_v,
        access=Access.VEC16 if operands.is_aligned else Access.ELEMENT,
        arch=whole.device.arch,
    )
    heads = whole.runtime.heads_q
    num_rows = operands.batch * heads * operands.length
    numbers: dict[str, float] = {
        **arguments.strides("out", operands.out_strides),
        **arguments.strides("d_out", operands.d_out_strides),
        **_by_head("lse", operands.lse_strides),
        **_by_head("d_lse", operands.d_lse_strides or (0, 0, 0)),
        "num_rows": num_rows,
        "len_q": operands.length,
        "heads_q": heads,
    }
    places = {
        "out": Place("out"),
        "d_out": Place("d_out_of_rows"),
        "lse": Place("lse"),
        "lse_log2": Place("stats"),
        "delta": Place("stats", 4 * num_rows),
    }
    has_sinks = problem.sinks is Switch.ON
    optional = {
        "d_lse": Place("d_lse") if operands.d_lse_strides is not None else None,
        "d_out_scale": Place("d_out_scale") if operands.has_scale else None,
        "sinks": Place("sinks") if has_sinks else None,
        "sink_rest": Place("stats", 8 * num_rows) if has_sinks else None,
        "d_sink": Place("stats", 12 * num_rows) if has_sinks else None,
    }
    arguments.add_optional(optional, numbers, places)
    return Step(spec, -(-num_rows * spec.lanes // spec.num_threads), numbers, places)


def _by_head(name: str, steps: Strides) -> dict[str, float]:
    kinds = ("batch", "head", "row")
    return {f"{name}_stride_{kind}": step for kind, step in zip(kinds, steps, strict=True)}


def _main(whole: _Pass) -> tuple[list[Step], BwdSpec, dict[str, Buffer]]:
    """Return the launches for dq, dk and dv."""
    runtime, operands, device = whole.runtime, whole.operands, whole.device
    problem = kernel_problem(whole.problem, runtime, device.arch)
    if problem.mask is not whole.problem.mask:  # without lists, whose sequences count as different
        corner = runtime.len_kv - runtime.len_q if problem.is_uniform else 0
        runtime = runtime._replace(diagonal=corner, listed=None)
        whole = whole._replace(problem=problem, runtime=runtime)
    spec = bwd_spec(problem, device.arch, deterministic=operands.deterministic)
    num_q_tiles, _ = tiles = whole.num_tiles(problem, spec.tile)
    buffers: dict[str, Buffer] = {}
    buffers["dq_sum"], dq_strides = _room_for_dq(whole, spec)
    if operands.deterministic:
        count = runtime.batch * runtime.heads_q * num_q_tiles
        buffers["turns"] = Buffer((count,), "int32", is_zeroed=True)
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
            _launch(
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
    steps.append(_postprocess(whole, spec, dq_strides))
    return steps, spec, buffers


def _room_for_dq(whole: _Pass, spec: BwdSpec) -> tuple[Buffer, Strides]:
    """Return zeros for the sums of dQ, and their strides."""
    operands, heads = whole.operands, whole.runtime.heads_q
    if spec.in_fragments:
        num_q_tiles, _ = whole.num_tiles(spec.problem, spec.tile)
        per_head = num_q_tiles * spec.tile.block_q * spec.dq_columns
        size = whole.runtime.batch * heads * per_head
        return Buffer((size,), "fp32", is_zeroed=True), (heads * per_head, 0, per_head)
    size = operands.batch * operands.length * heads * whole.problem.head_dim
    return Buffer((size,), "fp32", is_zeroed=True), operands.dq_strides


def _postprocess(whole: _Pass, spec: BwdSpec, dq_strides: Strides) -> Step:
    """Return the launch that makes dQ of its sums."""
    operands, runtime = whole.operands, whole.runtime
    num_rows = operands.batch * operands.length * runtime.heads_q
    rounding = dq_spec(spec)
    numbers: dict[str, float] = {
        **arguments.strides("out" if not isinstance(rounding, RoundSpec) else "dq",
                            operands.dq_strides),
        "num_rows": num_rows,
        "scale": arguments.positive_scale(runtime),
    }  # fmt: skip
    unscale = Place("d_out_scale", 4) if operands.has_scale else None
    if not isinstance(rounding, RoundSpec):
        places = {"parts": Place("dq_sum"), "out": Place("dq")}
        arguments.add_optional({"unscale": unscale}, numbers, places)
        batch, row, head = dq_strides
        numbers |= {
            "part_stride_part": 0,
            "part_stride_batch": batch,
            "part_stride_row": row,
            "part_stride_head": head,
            "length": operands.length,
            "heads": runtime.heads_q,
            "num_parts": 1,
        }
        num_threads = num_rows * -(-spec.problem.head_dim // 4)
        return Step(rounding, -(-num_threads // rounding.num_threads), numbers, places)
    tile = spec.tile
    num_q_tiles, _ = whole.num_tiles(spec.problem, tile)
    first_position = 0
    if runtime.listed is not None:  # tiles begin where lists do
        corner = runtime.diagonal
        if runtime.indices is not None and runtime.indices.arguments.bottom_right:
            corner += runtime.len_kv - runtime.len_q
        first_position = corner & (tile.block_q - 1)
    columns = padded_head_dim(spec.problem.head_dim) // rounding.column_tiles
    num_threads = runtime.batch * runtime.heads_q * num_q_tiles * tile.block_q * columns // 4
    places = {"sum": Place("dq_sum"), "dq": Place("dq")}
    arguments.add_optional({"unscale": unscale}, numbers, places)
    numbers |= {
        "sum_stride_batch": dq_strides[0],
        "sum_stride_head": dq_strides[2],
        "len_q": operands.length,
        "heads_q": runtime.heads_q,
        "first_position": first_position,
    }
    return Step(rounding, -(-num_threads // rounding.num_threads), numbers, places)


def _bias_gradient(whole: _Pass, bias_shape: tuple[int, ...]) -> tuple[Step, Buffer, bool]:
    """Return the launch for the gradient of a bias, its room, and whether sequences have own."""
    runtime, dtype = whole.runtime, whole.operands.bias_dtype
    target = target_of(bias_shape)
    spec = score_grad_spec(whole.problem, whole.device.arch, target)
    num_q_tiles, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    batch, heads, rows, columns = bias_shape
    # Lists: tiles begin elsewhere in every sequence, so that each needs a gradient of its own.
    differs = runtime.listed is not None and target is ScoreTarget.MATRIX
    differs &= batch == 1 < runtime.batch and whole.problem.q_layout is not SeqLayout.BATCHED
    if differs:
        batch = runtime.batch
    num_ctas = num_kv_tiles * batch * heads
    if target is ScoreTarget.MATRIX:
        num_ctas *= num_q_tiles
    strides = (heads * rows * columns, columns, rows * columns)
    targets = {"target_batch": batch, "target_heads": heads}
    step = _launch(whole, spec, num_ctas, Place("d_bias"), strides, None, targets)
    return step, Buffer((batch, heads, rows, columns), dtype, is_zeroed=True), differs


def _by_distance(whole: _Pass) -> tuple[Step, Buffer]:
    """Return the launch for sums of dS by key - query + Lkv, [2, B, Hq, Lq + Lkv]."""
    runtime = whole.runtime
    spec = score_grad_spec(whole.problem, whole.device.arch, ScoreTarget.DISTANCE)
    num_q_tiles, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    batch, heads = runtime.batch, runtime.heads_q
    num_ctas = (num_q_tiles + num_kv_tiles - 1) * batch * heads
    targets = {"target_batch": batch, "target_heads": heads}
    step = _launch(whole, spec, num_ctas, Place("by_distance"), (0, 0, 0), None, targets)
    return step, Buffer((2, batch, heads, runtime.len_q + runtime.len_kv), "fp32", is_zeroed=True)


def _launch(
    whole: _Pass,
    spec: BwdSpec | ScoreGradSpec,
    num_ctas: int,
    target: Place,
    target_strides: Strides,
    kv_targets: tuple[KvTarget, KvTarget] | None,
    changes: Mapping[str, float],
) -> Step:
    """Return a launch of a kernel that takes `BwdParams`; `target` is what it has as dq_sum."""
    if num_ctas > MAX_GRID:
        raise UnsupportedError(
            f"the backward pass needs {num_ctas} CTAs: a grid has at most 2**31 - 1; split the "
            "batch"
        )
    runtime, operands, prepared = whole.runtime, whole.operands, whole.prepared
    heads_q, heads_kv = runtime.heads_q, runtime.heads_kv
    num_q_tiles, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    num_rows = operands.batch * operands.length * heads_q
    numbers, places = arguments.tail(spec.problem, runtime, spec.tile.block_q)
    absent = ("out", "lse", "partial_out", "partial_lse", "arrivals", "lse_stride_batch",
              "lse_stride_head", "num_slots", "negate_q", "row_div_mul", "row_div_shift",
              "target_batch", "target_heads", "in_parts", "first_q_tile")  # fmt: skip
    numbers |= {
        **dict.fromkeys(absent, 0),
        **arguments.strides("q", runtime.q_strides),
        **arguments.strides("k", runtime.k_strides),
        **arguments.strides("v", runtime.v_strides),
        **arguments.strides("out", (0, 0, 0)),
        "batch": runtime.batch,
        "len_q": runtime.len_q,
        "len_kv": runtime.len_kv,
        "heads_q": heads_q,
        "heads_per_kv": heads_q // heads_kv,
        "heads_per_tile": 1,
        "num_q_tiles": num_q_tiles,
        "num_splits": 1,
        "diagonal": runtime.diagonal,
        "scale_log2": arguments.positive_scale(runtime) * arguments.LOG2_E,
        **arguments.strides("dq", target_strides),
        "stat_stride_batch": heads_q * operands.length if not operands.is_flat else 0,
        "stat_stride_head": operands.length,
        "num_kv_tiles": num_kv_tiles,
        "num_q_splits": 1,
        "end_q_tile": kv_parts.ALL_TILES,
        "scale": arguments.positive_scale(runtime),
        **changes,
    }
    places |= {
        **(prepared.inputs if prepared is not None else {n: Place(n) for n in ("q", "k", "v")}),
        "d_out": Place("d_out" if prepared is None else "d_out_parts"),
        "lse_log2": Place("stats"),
        "delta": Place("stats", 4 * num_rows),
        "dq_sum": target,
    }
    of_d_out = operands.main_d_out_strides
    if prepared is not None:
        of_d_out = prepared.plan.buffers["d_out_parts"].strides()
        numbers |= prepared.scale_numbers
        places |= {**prepared.scale_places, "d_out_part_scale": Place("d_out_part_scale")}
    numbers |= arguments.strides("d_out", of_d_out)
    has_sinks = spec.problem.sinks is Switch.ON
    optional = {
        "sink_rest": Place("stats", 8 * num_rows) if has_sinks else None,
        "d_out_scale": Place("d_out_scale") if operands.has_scale else None,
        "turns": Place("turns") if kv_targets is not None and operands.deterministic else None,
        "dk": None,
        "dv": None,
    }
    nowhere = kv_parts.KvStrides(0, 0, 0, 0)
    for idx, name in enumerate(("dk", "dv")):
        steps = nowhere if kv_targets is None else kv_targets[idx].strides
        numbers |= {**arguments.strides(name, steps[1:]), f"{name}_stride_split": steps.split}
        if kv_targets is not None:
            optional[name] = kv_targets[idx].place
    arguments.add_optional(optional, numbers, places)
    return Step(spec, num_ctas, numbers, places)

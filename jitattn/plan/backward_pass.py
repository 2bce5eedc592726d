"""Shared state of the launches of a backward pass: tensor facts and common arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jitattn.errors import UnsupportedError
from jitattn.jit.launch import MAX_GRID
from jitattn.kernels.bwd_sm90 import BwdSm90Spec
from jitattn.plan import arguments, kv_parts, wgmma_backward
from jitattn.plan.step import Place, Step
from jitattn.spec.enums import MaskKind, Switch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jitattn.kernels.bwd import BwdSpec
    from jitattn.kernels.bwd_captured import CapturedGradSpec
    from jitattn.kernels.bwd_scores import ScoreGradSpec
    from jitattn.kernels.bwd_sm90 import BwdSm90Tile
    from jitattn.kernels.bwd_tiles import BwdTile
    from jitattn.plan.kv_parts import KvGradient, KvTarget
    from jitattn.plan.prepare import Prepared
    from jitattn.plan.step import Device
    from jitattn.request.problem import Runtime, Strides
    from jitattn.spec.kernel_spec import Problem


class BackwardOperands(NamedTuple):
    """Tensor facts of a backward pass. Strides are (batch, row, head) unless stated otherwise."""

    batch: int  #: of q: 1 where it is flat
    length: int  #: rows of q
    is_flat: bool  #: q is [total, Hq, D]
    out_strides: Strides
    d_out_strides: Strides  #: as the preprocess kernel reads it, in the dtype of out
    main_d_out_strides: Strides  #: as the others do: in the dtype of q, scaled
    lse_strides: Strides  #: (batch, head, row)
    d_lse_strides: Strides | None  #: (batch, head, row); None: the LSE has no gradient
    is_aligned: bool  #: out and the preprocess kernel's dO, to 16 bytes
    has_scale: bool  #: dO is scaled to fit fp16
    dq_strides: Strides
    dk: KvGradient
    dv: KvGradient
    wanted: tuple[str, ...]  #: of `request.scores.ADDED` and captured tensors, those with gradients
    bias_shape: tuple[int, ...] | None
    bias_dtype: str
    dropout_scale: float
    num_splits: int | None
    deterministic: bool


class BackwardPass(NamedTuple):
    """Problem, sizes, operands and device of one backward pass."""

    problem: Problem
    runtime: Runtime
    operands: BackwardOperands
    device: Device
    prepared: Prepared | None = None  #: fp16 parts of the operands

    def num_tiles(self, problem: Problem, tile: BwdTile | BwdSm90Tile) -> tuple[int, int]:
        """Return the query tiles and key blocks of the longest sequence."""
        len_q = self.runtime.len_q
        if problem.mask is MaskKind.BLOCK_LISTS:
            len_q += tile.block_q - 1  # tiles are aligned to the block lists
        num_kv_tiles = -(-self.runtime.len_kv // tile.block_kv)
        if problem.mask is MaskKind.FINE_STRIDE:
            num_kv_tiles += 1  # local and strided keys may each leave a partial block
        return -(-len_q // tile.block_q), num_kv_tiles


def launch(
    whole: BackwardPass,
    spec: BwdSpec | BwdSm90Spec | ScoreGradSpec | CapturedGradSpec,
    num_ctas: int,
    target: Place | None,
    target_strides: Strides,
    kv_targets: tuple[KvTarget, KvTarget] | None,
    changes: Mapping[str, float],
) -> Step:
    """Return the launch of a kernel with `BwdParams`, which accumulates into `target` as dq_sum.

    `target`: None if it has other sums.
    """
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
    }
    of_d_out = operands.main_d_out_strides
    if prepared is not None:
        of_d_out = prepared.plan.buffers["d_out_parts"].strides()
        numbers |= prepared.scale_numbers
        places |= {**prepared.scale_places, "d_out_part_scale": Place("d_out_part_scale")}
    numbers |= arguments.strides("d_out", of_d_out)
    has_sinks = spec.problem.sinks is Switch.ON
    optional = {
        "dq_sum": target,
        "sink_rest": Place("stats", 8 * num_rows) if has_sinks else None,
        "d_out_scale": Place("d_out_scale") if operands.has_scale else None,
        "dq_semaphore": Place("dq_semaphore")
        if kv_targets is not None and operands.deterministic
        else None,
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
    if not isinstance(spec, BwdSm90Spec):
        return Step(spec, num_ctas, numbers, places)
    numbers["section_heads"] = wgmma_backward.section_heads(
        spec.problem, runtime, deterministic=operands.deterministic
    )
    numbers["unused"] = 0
    tile = spec.tile
    maps = wgmma_backward.maps_of(spec.problem, runtime, of_d_out, tile.block_q, tile.block_kv)
    return Step(spec, num_ctas, numbers, places, maps)

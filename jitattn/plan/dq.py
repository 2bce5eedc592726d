"""Plans dQ of a backward pass: its fp32 accumulator, and the postprocess launch that rounds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jitattn.kernels.bwd import BwdSpec, dq_spec
from jitattn.kernels.bwd_postprocess import BwdPostprocessSpec
from jitattn.plan import arguments
from jitattn.plan.step import Buffer, Place, Step
from jitattn.spec.kernel_spec import padded_head_dim

if TYPE_CHECKING:
    from jitattn.kernels.bwd_sm90 import BwdSm90Spec
    from jitattn.plan.backward_pass import BackwardPass
    from jitattn.request.problem import Strides


def room_for_dq(whole: BackwardPass, spec: BwdSpec | BwdSm90Spec) -> tuple[Buffer, Strides]:
    """Return the zeroed fp32 accumulator of dQ, and its strides."""
    operands, heads = whole.operands, whole.runtime.heads_q
    if spec.in_fragments:
        num_q_tiles, _ = whole.num_tiles(spec.problem, spec.tile)
        per_head = num_q_tiles * spec.tile.block_q * spec.dq_columns
        size = whole.runtime.batch * heads * per_head
        return Buffer((size,), "fp32", is_zeroed=True), (heads * per_head, 0, per_head)
    size = operands.batch * operands.length * heads * whole.problem.head_dim
    return Buffer((size,), "fp32", is_zeroed=True), operands.dq_strides


def postprocess(whole: BackwardPass, spec: BwdSpec | BwdSm90Spec, dq_strides: Strides) -> Step:
    """Plan the launch that converts the fp32 accumulator to dQ."""
    operands, runtime = whole.operands, whole.runtime
    num_rows = operands.batch * operands.length * runtime.heads_q
    rounding = dq_spec(spec) if isinstance(spec, BwdSpec) else spec.dq_spec
    numbers: dict[str, float] = {
        **arguments.strides("out" if not isinstance(rounding, BwdPostprocessSpec) else "dq",
                            operands.dq_strides),
        "num_rows": num_rows,
        "scale": arguments.positive_scale(runtime),
    }  # fmt: skip
    unscale = Place("d_out_scale", 4) if operands.has_scale else None
    if not isinstance(rounding, BwdPostprocessSpec):
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
    if runtime.listed is not None:  # tiles are aligned to the block lists
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

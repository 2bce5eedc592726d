"""Plans the first launch of a backward pass: LSE and delta of every row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jitattn.kernels.bwd_preprocess import BwdPreprocessSpec
from jitattn.plan import arguments
from jitattn.plan.step import Place, Step
from jitattn.spec.enums import Access, Switch

if TYPE_CHECKING:
    from jitattn.plan.backward_pass import BackwardPass
    from jitattn.request.problem import Strides


def preprocess(whole: BackwardPass, *, folds_sinks: bool) -> Step:
    """Plan the launch that computes the row statistics.

    They are the LSE in base 2, delta, the total weight that a sink leaves to the keys, and the
    row's contribution to dsinks. With `folds_sinks`, the LSE includes the sink.
    """
    operands, problem = whole.operands, whole.problem
    spec = BwdPreprocessSpec(
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
        "folds_sinks": folds_sinks,
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

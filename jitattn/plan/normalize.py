"""Plans the normalisation of cosine attention and its gradient: one launch each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jitattn.plan import arguments
from jitattn.plan.step import Place, Plan, Step

if TYPE_CHECKING:
    from jitattn.kernels.norm import NormGradSpec, NormSpec
    from jitattn.request.problem import Strides


class Side(NamedTuple):
    """Sizes and strides of q or k for the kernels."""

    rows: int
    heads: int  #: the faster index; for [B, H, L, D] the roles of rows and heads swap
    strides: Strides
    num_slices: int


def normalize(
    spec: NormSpec, of_q: Side, of_k: Side, *, heads_first: bool, has_scale: bool
) -> Plan:
    """Plan the launch that scales q and k to unit length, by groups of columns."""
    num_slices = of_q.num_slices + of_k.num_slices
    if not num_slices:
        return Plan((), {})
    numbers: dict[str, float] = {
        **arguments.strides("q", of_q.strides),
        **arguments.strides("k", of_k.strides),
        "num_slices_q": of_q.num_slices,
        "num_slices_k": of_k.num_slices,
        "len_q": of_q.rows,
        "len_k": of_k.rows,
        "heads_q": of_q.heads,
        "heads_k": of_k.heads,
        "scale_stride_row": heads_first,
        "scale_stride_head": not heads_first,
    }
    places = {name: Place(name) for name in ("q", "k", "q_out", "k_out")}
    scale = Place("head_scale") if has_scale else None
    arguments.add_optional({"head_scale": scale}, numbers, places)
    num_ctas = -(-num_slices * spec.lanes // spec.num_threads)
    return Plan((Step(spec, num_ctas, numbers, places),), {})


def normalize_gradient(
    spec: NormGradSpec, side: Side, *, heads_first: bool, has_scale: bool, has_d_scale: bool
) -> Plan:
    """Plan the gradient of q or k, and the partial sums of the gradient of head_scale."""
    numbers: dict[str, float] = {
        **arguments.strides("x", side.strides),
        "num_slices": side.num_slices,
        "len": side.rows,
        "heads": side.heads,
        "scale_stride_row": heads_first,
        "scale_stride_head": not heads_first,
    }
    places = {name: Place(name) for name in ("x", "d_y", "dx")}
    optional = {
        "head_scale": Place("head_scale") if has_scale else None,
        "d_scale": Place("d_scale") if has_d_scale else None,
    }
    arguments.add_optional(optional, numbers, places)
    num_ctas = -(-side.num_slices * spec.lanes // spec.num_threads)
    return Plan((Step(spec, num_ctas, numbers, places),), {})

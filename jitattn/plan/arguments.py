"""Builds the named arguments that all attention kernels share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from jitattn.kernels.fwd_arguments import FUNCTION_GAPS, FWD_SCORE, FWD_SEQ, function_struct
from jitattn.plan.step import Place
from jitattn.spec.call_arguments import BlockListArguments, alike
from jitattn.spec.program import parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jitattn.request.problem import Runtime, Strides
    from jitattn.spec.kernel_spec import Problem

LOG2_E: Final = math.log2(math.e)
#: Replaces a scale of 0, which would turn hidden scores, -inf, into NaN.
TINY_SCALE: Final = 1e-30
_ADDRESSES: Final = [one.name for one in (*FWD_SEQ.fields, *FWD_SCORE.fields) if one.is_address]


def positive_scale(runtime: Runtime) -> float:
    """Return |scale|, or `TINY_SCALE` for a scale of 0."""
    return abs(runtime.scale) or TINY_SCALE


def strides(name: str, steps: Strides) -> dict[str, float]:
    """Name the (batch, row, head) strides of a tensor."""
    kinds = ("batch", "row", "head")
    return {f"{name}_stride_{kind}": step for kind, step in zip(kinds, steps, strict=True)}


def page_strides(name: str, steps: Strides) -> dict[str, float]:
    """Name the (page, row, head) strides of a paged cache."""
    kinds = ("page", "row", "head")
    return {f"{name}_stride_{kind}": step for kind, step in zip(kinds, steps, strict=True)}


def add_optional(
    optional: Mapping[str, Place | None], numbers: dict[str, float], places: dict[str, Place]
) -> None:
    """Add optional addresses; an absent one is passed as 0."""
    for name, place in optional.items():
        if place is None:
            numbers[name] = 0
        else:
            places[name] = place


def sequences(runtime: Runtime) -> tuple[dict[str, float], dict[str, Place]]:
    """Return the arguments for the location of each sequence."""
    indices = runtime.indices
    found = alike(runtime.len_q, runtime.len_kv) if indices is None else indices.arguments
    return _split(found._asdict())


def scores(runtime: Runtime) -> tuple[dict[str, float], dict[str, Place]]:
    """Return the arguments of score modifications."""
    return _split({} if runtime.scores is None else runtime.scores._asdict())


def block_lists(tile_positions: int) -> tuple[dict[str, float], dict[str, Place]]:
    """Return the block-list arguments; addresses and sizes are filled in at run time."""
    numbers: dict[str, float] = {"tile_mask": tile_positions - 1}
    names = BlockListArguments._fields
    return numbers, {name: Place(block_list_operand(name, tile_positions)) for name in names}


def block_list_operand(name: str, tile_positions: int) -> str:
    """Return the operand name of a block-list argument; lists differ by positions per tile."""
    return f"{name} of {tile_positions}"


def tail(
    problem: Problem, runtime: Runtime, tile_positions: int
) -> tuple[dict[str, float], dict[str, Place]]:
    """Return the optional arguments: sequences, score modifications and block lists."""
    numbers: dict[str, float] = {}
    places: dict[str, Place] = {}
    parts = []
    if not problem.is_uniform or problem.has_scores:
        parts.append(sequences(runtime))
    if problem.has_scores:
        parts.append(scores(runtime))
    if runtime.listed is not None:
        parts.append(block_lists(tile_positions))
    if runtime.function is not None:
        count = len(parse(problem.function).tensors)
        names = [f"tensor{idx}" for idx in range(count)]
        own = dict(runtime.function)
        fields = {one.name for one in function_struct(problem.function).fields}
        own |= {name: 0 for name in FUNCTION_GAPS if name in fields}
        parts.append((own, {name: Place(name) for name in names}))
    for more_numbers, more_places in parts:
        numbers |= more_numbers
        places |= more_places
    return numbers, places


def _split(values: dict[str, float]) -> tuple[dict[str, float], dict[str, Place]]:
    """Separate constants from addresses, which vary per call; absent addresses are constant 0."""
    places = {name: Place(name) for name in _ADDRESSES if values.get(name)}
    return {name: value for name, value in values.items() if name not in places}, places

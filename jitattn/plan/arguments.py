"""Arguments that all kernels for attention have, by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from jitattn.plan.step import Place
from jitattn.spec.params import FWD_LIST_FIELDS, FWD_SCORE_FIELDS, FWD_SEQ_FIELDS

if TYPE_CHECKING:
    from jitattn.request.problem import Runtime, Strides
    from jitattn.spec.kernel_spec import Problem

LOG2_E: Final = math.log2(math.e)
#: Stands for a scale of 0, with which a hidden score, -inf, would become NaN.
TINY_SCALE: Final = 1e-30
_SEQUENCES: Final = [name for name, _ in FWD_SEQ_FIELDS]
_SEQUENCE_ADDRESSES: Final = [name for name, code in FWD_SEQ_FIELDS if code == "Q"]
_SCORES: Final = [name for name, _ in FWD_SCORE_FIELDS]
_SCORE_ADDRESSES: Final = [name for name, code in FWD_SCORE_FIELDS if code == "Q"]
#: Arguments that come with block lists.
LISTED: Final = [name for name, _ in FWD_LIST_FIELDS][:5]


def positive_scale(runtime: Runtime) -> float:
    """Return |scale|, never 0."""
    return abs(runtime.scale) or TINY_SCALE


def strides(name: str, steps: Strides) -> dict[str, float]:
    """Return the strides of a tensor, as (batch, row, head), by name."""
    kinds = ("batch", "row", "head")
    return {f"{name}_stride_{kind}": step for kind, step in zip(kinds, steps, strict=True)}


def sequences(runtime: Runtime) -> tuple[dict[str, float], dict[str, Place]]:
    """Return where sequences lie."""
    indices = runtime.indices
    if indices is None:  # a kernel for uniform sequences reads none of them
        nothing: dict[str, float] = dict.fromkeys(_SEQUENCES, 0)
        return nothing, {}
    values = (*indices.addresses, indices.bottom_right, *indices.counts)
    numbers: dict[str, float] = dict(zip(_SEQUENCES, values, strict=True))
    return _split(numbers, _SEQUENCE_ADDRESSES)


def scores(runtime: Runtime) -> tuple[dict[str, float], dict[str, Place]]:
    """Return what is done with scores."""
    return _split(dict(zip(_SCORES, runtime.score_params, strict=True)), _SCORE_ADDRESSES)


def lists(tile_positions: int) -> tuple[dict[str, float], dict[str, Place]]:
    """Return what is known of block lists ahead; the rest comes with the lists themselves."""
    numbers: dict[str, float] = {"tile_mask": tile_positions - 1, "reserved": 0}
    return numbers, {name: Place(list_operand(name, tile_positions)) for name in LISTED}


def list_operand(name: str, tile_positions: int) -> str:
    """Return the operand for an argument of block lists; lists differ by positions of a tile."""
    return f"{name} of {tile_positions}"


def tail(
    problem: Problem, runtime: Runtime, tile_positions: int
) -> tuple[dict[str, float], dict[str, Place]]:
    """Return what follows the arguments that every kernel for attention has."""
    numbers: dict[str, float] = {}
    places: dict[str, Place] = {}
    parts = []
    if not problem.is_uniform or problem.has_scores:
        parts.append(sequences(runtime))
    if problem.has_scores:
        parts.append(scores(runtime))
    if runtime.listed is not None:
        parts.append(lists(tile_positions))
    for more_numbers, more_places in parts:
        numbers |= more_numbers
        places |= more_places
    return numbers, places


def _split(
    values: dict[str, float], addresses: list[str]
) -> tuple[dict[str, float], dict[str, Place]]:
    """Separate addresses, which differ from call to call, but for those that are 0: absent."""
    places = {name: Place(name) for name in addresses if values[name]}
    return {name: value for name, value in values.items() if name not in places}, places

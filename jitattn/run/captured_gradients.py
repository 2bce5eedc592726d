"""Turns integer sums into the gradients of tensors that a traced function captures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

from jitattn.plan.score_gradients import (
    SUM_BITS,
    captured_bits,
    captured_shape,
    wanted_sums,
)
from jitattn.spec.call_arguments import captured_name, captured_numbers
from jitattn.spec.program import parse

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from jitattn.request.request import Request
    from jitattn.request.scores import Scores

#: Of the least normal number of fp32; kernels know no others.
_LEAST_EXPONENT: Final = -126


def captured_gradients(
    buffers: dict[str, Tensor],
    scores: Scores,
    request: Request,
    wanted: Collection[str],
    d_out_scale: Tensor | None,
) -> dict[str, Tensor]:
    """Return the gradients of captured tensors, in their dtypes.

    Parameters
    ----------
    buffers : dict
        Of the backward pass: "captured_sums" [elements of all wanted tensors], and
        "captured_most" [tensors], bits of the largest contribution to each, which make its unit.
    scores : Scores
    request : Request
        Of the call.
    wanted : collection of str
        Names of `request.scores`.
    d_out_scale : Tensor, optional
        [2], by which dO was scaled, and its inverse.
    """
    function = scores.function
    if function is None:
        return {}
    problem, runtime = request.problem, request.runtime
    found = {
        captured_name(idx): torch.zeros_like(function.tensors[idx])
        for idx in captured_numbers(wanted)
    }
    numbers = wanted_sums(problem, wanted)
    if not numbers:
        return found
    program = parse(problem.function)
    most = buffers["captured_most"].view(torch.float32).double()
    _, exponents = torch.frexp(most)
    exponents = exponents.clamp(min=_LEAST_EXPONENT) - captured_bits(problem, runtime)
    units = torch.ldexp(torch.ones_like(most), exponents)
    if d_out_scale is not None:
        units = units * d_out_scale[1]
    begin = 0
    for idx in numbers:
        shape = captured_shape(runtime, program, idx)
        sums = buffers["captured_sums"][begin : begin + math.prod(shape)].view(shape)
        begin += sums.numel()
        gradient = torch.where(sums.abs() < 2**SUM_BITS, sums * units[idx], math.nan)
        found[captured_name(idx)] = gradient.to(function.tensors[idx].dtype)
    return found

"""Copies inputs whose last stride is not 1, which kernels do not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.cache.files import warn_once

if TYPE_CHECKING:
    from torch import Tensor


def with_unit_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors whose last strides are 1: copies of those where they are not.

    The first copy logs a warning, but not while torch.compile traces.
    """
    if all(tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 for tensor in tensors):
        return tensors
    if not torch.compiler.is_dynamo_compiling():
        apart = next(one for one in tensors if one.shape[-1] > 1 and one.stride(-1) != 1)
        warn_once(
            "strides",
            f"q, k or v of shape {list(apart.shape)} has strides {tuple(apart.stride())}: it is "
            "copied at each call, as kernels read rows whose last stride is 1; store it with the "
            "head dim last to save that",
        )
    return tuple(tensor.contiguous() for tensor in tensors)

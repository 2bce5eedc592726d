"""L2 normalization in differentiable torch operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from jitattn.values.autocast import outside_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.norm import L2Norm

_EPSILON: Final = 1e-12


@outside_autocast
def unit_vectors(x: Tensor, groups: int) -> Tensor:
    """Scale slices of vectors to length 1, in fp32 or wider; slices that are 0 stay 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    is_zero = length < _EPSILON  # a zero vector: result and gradient are 0
    unit: Tensor = wide / length.masked_fill(is_zero, 1.0)
    return unit.masked_fill(is_zero, 0.0).reshape(x.shape)


@outside_autocast
def normalized(q: Tensor, k: Tensor, norm: L2Norm, head_axis: int) -> tuple[Tensor, Tensor]:
    """Return q (times `head_scale`) and k at length 1, in fp32 or wider."""
    units = unit_vectors(q, norm.groups)
    if norm.head_scale is not None:
        shape = [1] * q.dim()
        shape[head_axis] = -1
        units = units * norm.head_scale.view(shape)
    return units, unit_vectors(k, norm.groups)

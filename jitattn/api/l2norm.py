"""`jitattn.l2norm`: L2 normalization of vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.cpu.norm import unit_vectors
from jitattn.errors import InvalidInputError
from jitattn.values.given import integer
from jitattn.values.tensors import index_address

if TYPE_CHECKING:
    from torch import Tensor


def l2norm(x: Tensor, groups: int = 1) -> Tensor:
    """Scale vectors, or equal slices of them, to length 1, in fp32.

    Differentiable. A vector shorter than 1e-12 has no direction: it becomes 0.

    Parameters
    ----------
    x : Tensor, [..., D]
    groups : int
        Slices, a divisor of D.

    Returns
    -------
    Tensor, shape and dtype of x
    """
    number = integer(groups)
    if number is None or number < 1 or x.shape[-1] % number:
        raise InvalidInputError(
            f"groups={groups!r}: it must be an int that divides head_dim, which is {x.shape[-1]}"
        )
    if not torch.compiler.is_dynamo_compiling():
        index_address("x", x)  # refuses freed memory
    return unit_vectors(x, number).to(x.dtype)

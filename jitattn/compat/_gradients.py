"""Gradients of a call whose result and LSE the caller has kept; no autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import jitattn.run.operators  # noqa: F401 - registers the operators
from jitattn.api.attention import bind
from jitattn.run.operator_encoding import encode

if TYPE_CHECKING:
    from torch import Tensor


@torch.no_grad()
def gradients_of(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dv of ``attention(q, k, v, **arguments)``.

    Parameters
    ----------
    d_out, out : Tensor, as the result of the call
    lse : Tensor, fp32
        As the call returns it: -inf for rows that see nothing.
    """
    tensors, call = bind(q, k, v, arguments)
    q, k, v = (tensors[name] for name in "qkv")
    found = torch.ops.jitattn.attention_backward(
        d_out, torch.zeros_like(lse), q, k, v, out, lse, *encode(call), []
    )
    return found[0], found[1], found[2]

"""Nested tensors in `attention`: jagged and strided ones, as ragged sequences and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from jitattn.errors import InvalidInputError
from jitattn.request.problem import axes
from jitattn.run.indirect import attention_indirectly
from jitattn.run.operators import call_operator
from jitattn.values.nested import flattened

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call

#: Dimension of the rows of a sequence, by layout.
_ROWS = {"bshd": 1, "bhsd": 2}


def are_nested(*tensors: object) -> bool:
    """Return whether a tensor is nested."""
    return any(isinstance(x, torch.Tensor) and x.is_nested for x in tensors)


def attention_of_nested(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:  # noqa: ANN401
    """Compute `attention` on nested tensors; the result is nested like q, the LSE ragged.

    Parameters
    ----------
    q, k, v : Tensor
        Nested [B, j, H, D], or [B, H, j, D] with layout "bhsd"; q alone, or k and v alone, may be a
        batch.
    call : Call

    Raises
    ------
    InvalidInputError
        They do not fit together, or an argument does not fit nested tensors.
    """
    for name in ("q_seqs", "kv_seqs", "out"):
        if getattr(call, name) is not None:
            raise InvalidInputError(
                f"{name} is given with nested tensors, which have sequences and results of their "
                f"own: leave it out, or pass .values() of jagged tensors with {name}"
            )
    axes(call.layout)  # raises for an unknown layout
    rows = _ROWS[call.layout]
    if k.is_nested != v.is_nested:
        raise InvalidInputError("one of k and v is nested: nest both, or none")
    of_q = flattened("q", q, rows) if q.is_nested else None
    if k.is_nested:
        of_k, of_v = flattened("k", k, rows), flattened("v", v, rows)
        of_k.check_like(of_v)
        call = call._replace(kv_seqs=of_k.sequences())
        k, v = of_k.values, of_v.values
    if of_q is not None:
        call = call._replace(q_seqs=of_q.sequences())
        q = of_q.values
    attend = call_operator if is_dynamo_compiling() else attention_indirectly
    found = attend(q, k, v, call)
    if of_q is None:
        return found
    return (of_q.nest(found[0]), found[1]) if call.return_lse else of_q.nest(found)

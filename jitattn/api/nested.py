"""Nested tensors in `attention`: jagged and strided ones, as ragged sequences and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from jitattn.errors import InvalidInputError
from jitattn.request.problem import axes
from jitattn.run.indirect import attention_indirectly
from jitattn.run.operators import call_operator
from jitattn.values.sequences import Ragged

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
    if k.is_nested != v.is_nested:
        raise InvalidInputError("one of k and v is nested: nest both, or none")
    of_q = _sequences("q", q, call.layout) if q.is_nested else None
    if k.is_nested:
        of_k, of_v = _sequences("k", k, call.layout), _sequences("v", v, call.layout)
        of_k.check_like(of_v)
        call = call._replace(kv_seqs=of_k.ragged())
        k, v = of_k.values, of_v.values
    if of_q is not None:
        call = call._replace(q_seqs=of_q.ragged())
        q = of_q.values
    attend = call_operator if is_dynamo_compiling() else attention_indirectly
    found = attend(q, k, v, call)
    if of_q is None:
        return found
    return (of_q.nest(found[0]), found[1]) if call.return_lse else of_q.nest(found)


def _sequences(name: str, nested: Tensor, layout: str) -> _Jagged | _Strided:
    if nested.dim() != 4:
        raise InvalidInputError(
            f"{name} is nested, with {nested.dim()} dimensions: it must have 4, as B sequences "
            "[L, H, D], or [H, L, D] with layout='bhsd'"
        )
    kind = _Jagged if nested.layout == torch.jagged else _Strided
    return kind(name, nested, _ROWS[layout])


class _Jagged:
    """A jagged tensor, by its values [total, H, D], without a copy."""

    def __init__(self, name: str, nested: Any, rows: int) -> None:  # noqa: ANN401 - more than a Tensor
        if nested._ragged_idx != rows:
            raise InvalidInputError(
                f"{name} is jagged in dimension {nested._ragged_idx}, and layout asks for {rows}: "
                'layout="bshd" is [B, j, H, D], layout="bhsd" [B, H, j, D]'
            )
        self._nested, self._rows = nested, rows
        self._offsets, self._lengths = nested.offsets(), nested.lengths()
        values = nested.values()
        self.values: Tensor = values if rows == 1 else values.transpose(0, 1)

    def ragged(self) -> Ragged:
        """Return the sequences in `values`; waits for the device if torch knows no bound."""
        longest = getattr(self._nested, "_maybe_max_seqlen", None)
        if self._lengths is None:
            return Ragged.from_cu_seqlens(self._offsets, longest)
        return Ragged(self._offsets[:-1], self._lengths, longest)  # with gaps between them

    def check_like(self, other: _Jagged | _Strided) -> None:
        """Refuse values whose sequences differ from the keys'; waits only if offsets differ."""
        if isinstance(other, _Jagged):
            pairs = ((self._offsets, other._offsets), (self._lengths, other._lengths))
            if all(_are_equal(one, two) for one, two in pairs):
                return
        raise InvalidInputError(
            "k and v are nested with other offsets, or in other layouts: make v with "
            "torch.nested.nested_tensor_from_jagged(values, k.offsets())"
        )

    def nest(self, flat: Tensor) -> Tensor:
        """Convert a result [total, H, Dv] to a jagged tensor with this tensor's offsets."""
        values = flat if self._rows == 1 else flat.transpose(0, 1)
        longest = getattr(self._nested, "_maybe_max_seqlen", None)
        known = {} if longest is None else {"max_seqlen": longest}
        return torch.nested.nested_tensor_from_jagged(
            values, self._offsets, self._lengths, jagged_dim=self._rows, **known
        )


class _Strided:
    """A strided nested tensor, copied to values [total, H, D]."""

    def __init__(self, name: str, nested: Tensor, rows: int) -> None:
        parts = nested.unbind()
        if rows == 2:
            parts = tuple(part.transpose(0, 1) for part in parts)
        self._lengths = [part.shape[0] for part in parts]
        if len({part.shape[1:] for part in parts}) != 1:
            shapes = ", ".join(str(list(part.shape)) for part in parts[:4])
            raise InvalidInputError(
                f"{name} has sequences [L, H, D] of shapes {shapes}, ...: all need the same number "
                "of heads, and the same head_dim"
            )
        self._rows = rows
        self.values = torch.cat(parts)

    def ragged(self) -> Ragged:
        """Return the sequences in `values`."""
        lengths = torch.tensor([0, *self._lengths], dtype=torch.int64, device="cpu")
        cumulative = lengths.cumsum(0).to(self.values.device, torch.int32, non_blocking=True)
        return Ragged.from_cu_seqlens(cumulative, max(self._lengths))

    def check_like(self, other: _Jagged | _Strided) -> None:
        """Refuse values whose sequences differ from the keys'."""
        if not isinstance(other, _Strided) or self._lengths != other._lengths:
            raise InvalidInputError("k and v are nested with other lengths, or in other layouts")

    def nest(self, flat: Tensor) -> Tensor:
        """Convert a result [total, H, Dv] to a strided nested tensor."""
        parts = torch.split(flat, self._lengths)
        if self._rows == 2:
            parts = tuple(part.transpose(0, 1) for part in parts)
        return torch.nested.as_nested_tensor(list(parts))


def _are_equal(one: Tensor | None, two: Tensor | None) -> bool:
    if one is two:
        return True
    if one is None or two is None or one.shape != two.shape:
        return False
    return torch.equal(one, two)

"""Converts nested tensors [B, H, L, D] to ragged sequences [total, H, D], and back."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.compat._errors import ExtensionError
from jitattn.compat._transfer import on_device
from jitattn.values.sequences import Ragged
from jitattn.values.tensors import PLAIN, is_transformed

if TYPE_CHECKING:
    from torch import Tensor

#: Pairs of offsets, or lengths, that were compared and are equal, and the versions that were.
_equal: dict[tuple[int, int], tuple[weakref.ref[Tensor], weakref.ref[Tensor], int, int]] = {}
_MOST_EQUAL: Final = 256


class Jagged:
    """A jagged tensor [B, H, j, D], by its values, offsets and lengths, without a copy.

    Attributes
    ----------
    values : Tensor, [total, H, D]
        A view.
    """

    def __init__(self, name: str, nested: Any) -> None:  # noqa: ANN401 - with more than a Tensor has
        ragged = nested._ragged_idx
        if ragged != 2:
            sizes = ["j" if idx == ragged else str(size) for idx, size in enumerate(nested.shape)]
            raise ExtensionError(
                f"{name} is a jagged tensor [{', '.join(sizes)}]: it must be [B, H, j, D], where "
                f"lengths differ in dimension 2; call {name}.transpose(1, 2) on [B, j, H, D]"
            )
        self._offsets, self._lengths = nested.offsets(), nested.lengths()
        self._nested = nested
        self.values: Tensor = nested.values().transpose(0, 1)

    def sequences(self) -> Ragged:
        """Return the sequences in `values`; synchronizes if the largest length is unknown."""
        longest = _longest(self._nested)
        if longest is None and _is_capturing(self.values):
            longest = self.values.shape[0]  # a bound
        if self._lengths is None:
            return Ragged.from_cu_seqlens(self._offsets, longest)
        return Ragged(self._offsets[:-1], self._lengths, longest)  # with gaps between them

    def check_like(self, other: Jagged) -> None:
        """Refuse values whose offsets differ from the keys'.

        Tensors that share offsets, or their memory, are told by that alone. Others are compared,
        which waits for the device, once until they are written to; where that cannot be, they are
        refused.
        """
        pairs = ((self._offsets, other._offsets), (self._lengths, other._lengths))
        own = [(one, two) for one, two in pairs if one is not two]
        if not own or self.values.device != other.values.device:
            return  # the core reports wrong devices
        way_out = "make V with torch.nested.nested_tensor_from_jagged(values, K.offsets(), ...)"
        is_capturing = _is_capturing(self.values)
        if not torch.compiler.is_compiling() and all(_share_memory(*pair) for pair in own):
            return
        if torch.compiler.is_compiling() or is_capturing:
            where = "torch.compile" if torch.compiler.is_compiling() else "a CUDA graph capture"
            raise ExtensionError(
                f"K and V have offsets of their own, which {where} cannot compare: they must share "
                f"one tensor of them; {way_out}"
            )
        if all(one is not None and two is not None and _are_equal(one, two) for one, two in own):
            return
        check_lengths(self._host_lengths(), other._host_lengths(), way_out)
        raise ExtensionError(
            "K and V have sequences of the same lengths, with other gaps between them: they must "
            "lie alike; call .contiguous() on both"
        )

    def _host_lengths(self) -> list[int]:
        lengths = self._offsets.diff() if self._lengths is None else self._lengths
        return [int(length) for length in lengths.tolist()]

    def nest(self, flat: Tensor) -> Tensor:
        """Convert a result [total, H, Dv] to a jagged tensor with this tensor's offsets."""
        longest = _longest(self._nested)
        known = {} if longest is None else {"max_seqlen": longest}
        return torch.nested.nested_tensor_from_jagged(
            flat.transpose(0, 1), self._offsets, self._lengths, jagged_dim=2, **known
        )


class Strided:
    """A strided nested tensor of B sequences [H, L, D], copied to a ragged one."""

    def __init__(self, name: str, nested: Tensor) -> None:
        parts = nested.unbind()
        self._lengths = [part.shape[1] for part in parts]
        if len({(part.shape[0], part.shape[2]) for part in parts}) != 1:
            shapes = ", ".join(str(list(part.shape)) for part in parts[:4])
            raise ExtensionError(
                f"{name} has sequences of shapes {shapes}, ...: they must be [H, L, D], with one H "
                "and one D; turn sequences [L, H, D] with .transpose(0, 1) before nesting them"
            )
        self.values = torch.cat([part.transpose(0, 1) for part in parts])

    def sequences(self) -> Ragged:
        """Return the sequences in `values`."""
        lengths = torch.tensor([0, *self._lengths], dtype=torch.int64, device="cpu")
        cumulative = lengths.cumsum(0).to(torch.int32)
        offsets = on_device("the list of lengths", cumulative, self.values.device)
        return Ragged.from_cu_seqlens(offsets, max(self._lengths))

    def check_like(self, other: Strided) -> None:
        """Refuse values whose lengths differ from the keys'; torch has lengths on the host."""
        check_lengths(self._lengths, other._lengths, "nest them by one list of lengths")

    def nest(self, flat: Tensor) -> Tensor:
        """Convert a result [total, H, Dv] to a strided nested tensor."""
        parts = torch.split(flat, self._lengths)
        return torch.nested.as_nested_tensor([part.transpose(0, 1) for part in parts])


def flattened(Q: Tensor, K: Tensor, V: Tensor) -> list[Any]:  # noqa: N803 - the door's names
    """Return Q, K and V as `Jagged` or `Strided`.

    Raises
    ------
    ExtensionError
        One is not nested, or not as [B, H, L, D], or they do not fit together.
    """
    named = {"Q": Q, "K": K, "V": V}
    for name, tensor in named.items():
        if not tensor.is_nested:
            raise ExtensionError(
                f"{name} is not nested: Q, K and V must all be nested tensors, or none; nest it in "
                "the layout of the others (torch.nested)"
            )
        if tensor.dim() != 4:
            raise ExtensionError(
                f"{name} is nested, with {tensor.dim()} dimensions: it must have 4, as B sequences "
                "[H, L, D]"
            )
    counts = [tensor.size(0) for tensor in named.values()]
    if 0 in counts or len(set(counts)) != 1:
        raise ExtensionError(
            f"Q, K and V have {counts[0]}, {counts[1]} and {counts[2]} sequences: they must have "
            "as many, and at least one"
        )
    if K.layout != V.layout:
        raise ExtensionError(
            f"K is nested as {K.layout} and V as {V.layout}: both must be of one layout; pass "
            "layout=torch.jagged where the other one is nested"
        )
    q, k, v = (
        Jagged(name, tensor) if tensor.layout == torch.jagged else Strided(name, tensor)
        for name, tensor in named.items()
    )
    k.check_like(v)  # type: ignore[arg-type]
    return [q, k, v]


def check_lengths(keys: list[int], values: list[int], way_out: str) -> None:
    """Refuse sequences with different numbers of keys and values."""
    for idx, (own, other) in enumerate(zip(keys, values, strict=True)):
        if own != other:
            raise ExtensionError(
                f"sequence {idx} has length {own} in K and {other} in V: every key needs a value; "
                f"{way_out}"
            )


def _longest(nested: Any) -> int | None:  # noqa: ANN401
    """Return the largest length, cached by torch from 2.5 on; None where it cannot be read."""
    if torch.compiler.is_compiling() or not hasattr(nested, "_maybe_max_seqlen"):
        return None  # a compiled call reads it at run time: no graph depends on it
    known: int | None = nested._maybe_max_seqlen
    return nested._max_seqlen if known is None and not _is_capturing(nested) else known


def _is_capturing(tensor: Any) -> bool:  # noqa: ANN401
    return bool(tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _share_memory(one: Tensor | None, two: Tensor | None) -> bool:
    """Return whether two tensors of indices are the same numbers in the same place."""
    if one is None or two is None or type(one) not in PLAIN or type(two) not in PLAIN:
        return False
    if is_transformed(one) or is_transformed(two) or one.data_ptr() != two.data_ptr():
        return False
    return one.dtype is two.dtype and one.shape == two.shape and one.stride() == two.stride()


def _are_equal(one: Tensor, two: Tensor) -> bool:
    """Compare two tensors of indices; waits for the device unless it is known of a call before."""
    key = (id(one), id(two))
    known = _equal.get(key)
    is_known = known is not None and known[0]() is one and known[1]() is two
    if known is not None and is_known and known[2:] == (one._version, two._version):
        return True
    is_counted = not (one.is_inference() or two.is_inference())  # whether writes are
    versions = (one._version, two._version) if is_counted else None
    if not torch.equal(one, two):
        return False
    if versions is not None:
        if len(_equal) >= _MOST_EQUAL:
            _equal.clear()
        _equal[key] = (weakref.ref(one), weakref.ref(two), *versions)
    return True

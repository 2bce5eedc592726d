"""Takes nested tensors apart, to values [total, H, D] and ragged sequences, and nests results."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.errors import InvalidInputError
from jitattn.values.sequences import Ragged
from jitattn.values.tensors import PLAIN, is_transformed
from jitattn.values.transfer import on_device

if TYPE_CHECKING:
    from torch import Tensor

#: Pairs of offsets, or lengths, that were compared and are equal, and the versions that were.
_equal: dict[tuple[int, int], tuple[weakref.ref[Tensor], weakref.ref[Tensor], int, int]] = {}
_MOST_EQUAL: Final = 256


def flattened(name: str, nested: Tensor, rows: int) -> Jagged | Strided:
    """Take a nested tensor apart.

    Parameters
    ----------
    name : str
        Of the argument, for messages.
    nested : Tensor
        B sequences, jagged or strided.
    rows : int
        Dimension of the sequences' rows: 1 for [B, j, H, D], 2 for [B, H, j, D].

    Raises
    ------
    InvalidInputError
        It is not nested so.
    """
    own = "[L, H, D]" if rows == 1 else "[H, L, D]"
    if nested.dim() != 4:
        raise InvalidInputError(
            f"{name} is nested, with {nested.dim()} dimensions: it must have 4, as B sequences "
            f"{own}"
        )
    if nested.size(0) == 0:
        raise InvalidInputError(f"{name} is nested, with no sequences: it must have at least one")
    return (Jagged if nested.layout == torch.jagged else Strided)(name, nested, rows)


class Jagged:
    """A jagged tensor, by its values, offsets and lengths, without a copy.

    Attributes
    ----------
    values : Tensor, [total, H, D]
        A view.
    """

    def __init__(self, name: str, nested: Any, rows: int) -> None:  # noqa: ANN401 - more than a Tensor
        ragged = nested._ragged_idx
        if ragged != rows:
            sizes = ["j" if idx == ragged else str(size) for idx, size in enumerate(nested.shape)]
            wanted = "[B, j, H, D]" if rows == 1 else "[B, H, j, D]"
            raise InvalidInputError(
                f"{name} is a jagged tensor [{', '.join(sizes)}]: in this layout it must be "
                f"{wanted}, where lengths differ in dimension {rows}; call "
                f"{name}.transpose(1, 2)"
            )
        self._name, self._nested, self._rows = name, nested, rows
        self._offsets, self._lengths = nested.offsets(), nested.lengths()
        values = nested.values()
        self.values: Tensor = values if rows == 1 else values.transpose(0, 1)

    def sequences(self) -> Ragged:
        """Return the sequences in `values`; synchronizes if the largest length is unknown."""
        longest = _longest(self._nested)
        if longest is None and _is_capturing(self.values):
            longest = self.values.shape[0]  # a bound
        if self._lengths is None:
            return Ragged.from_cu_seqlens(self._offsets, longest)
        return Ragged(self._offsets[:-1], self._lengths, longest)  # with gaps between them

    def check_like(self, other: Jagged | Strided) -> None:
        """Refuse values whose offsets differ from these keys'.

        Tensors that share offsets, or their memory, are told by that alone. Others are compared,
        which waits for the device, once until they are written to; where that cannot be, they are
        refused.
        """
        if not isinstance(other, Jagged):
            raise _other_layout(self._name, other._name, self._nested, other._nested)
        pairs = ((self._offsets, other._offsets), (self._lengths, other._lengths))
        own = [(one, two) for one, two in pairs if one is not two]
        if not own or self.values.device != other.values.device:
            return  # wrong devices are reported with those of the other tensors
        names = f"{self._name} and {other._name}"
        way_out = (
            f"make {other._name} with "
            f"torch.nested.nested_tensor_from_jagged(values, {self._name}.offsets(), ...)"
        )
        is_capturing = _is_capturing(self.values)
        if not torch.compiler.is_compiling() and all(_share_memory(*pair) for pair in own):
            return
        if torch.compiler.is_compiling() or is_capturing:
            where = "torch.compile" if torch.compiler.is_compiling() else "a CUDA graph capture"
            raise InvalidInputError(
                f"{names} have offsets of their own, which {where} cannot compare: they must share "
                f"one tensor of them; {way_out}"
            )
        if all(one is not None and two is not None and _are_equal(one, two) for one, two in own):
            return
        _check_lengths(
            (self._name, self._host_lengths()), (other._name, other._host_lengths()), way_out
        )
        raise InvalidInputError(
            f"{names} have sequences of the same lengths, with other gaps between them: they must "
            "lie alike; call .contiguous() on both"
        )

    def _host_lengths(self) -> list[int]:
        lengths = self._offsets.diff() if self._lengths is None else self._lengths
        return [int(length) for length in lengths.tolist()]

    def nest(self, flat: Tensor) -> Tensor:
        """Convert a result [total, H, Dv] to a jagged tensor with this tensor's offsets."""
        longest = _longest(self._nested)
        known = {} if longest is None else {"max_seqlen": longest}
        values = flat if self._rows == 1 else flat.transpose(0, 1)
        return torch.nested.nested_tensor_from_jagged(
            values, self._offsets, self._lengths, jagged_dim=self._rows, **known
        )


class Strided:
    """A strided nested tensor, copied to values.

    Attributes
    ----------
    values : Tensor, [total, H, D]
    """

    def __init__(self, name: str, nested: Tensor, rows: int) -> None:
        parts = nested.unbind()
        if len({(*part.shape[: rows - 1], *part.shape[rows:]) for part in parts}) != 1:
            shapes = ", ".join(str(list(part.shape)) for part in parts[:4])
            own = "[L, H, D]" if rows == 1 else "[H, L, D]"
            raise InvalidInputError(
                f"{name} has sequences of shapes {shapes}, ...: they must be {own}, with one H "
                "and one D; turn others with .transpose(0, 1) before nesting them"
            )
        self._name, self._nested, self._rows = name, nested, rows
        self._lengths = [part.shape[rows - 1] for part in parts]
        self.values = torch.cat(parts if rows == 1 else [part.transpose(0, 1) for part in parts])

    def sequences(self) -> Ragged:
        """Return the sequences in `values`."""
        lengths = torch.tensor([0, *self._lengths], dtype=torch.int64, device="cpu")
        cumulative = lengths.cumsum(0).to(torch.int32)
        offsets = on_device("the list of lengths", cumulative, self.values.device)
        return Ragged.from_cu_seqlens(offsets, max(self._lengths))

    def check_like(self, other: Jagged | Strided) -> None:
        """Refuse values whose lengths differ from these keys'; torch has lengths on the host."""
        if not isinstance(other, Strided):
            raise _other_layout(self._name, other._name, self._nested, other._nested)
        _check_lengths(
            (self._name, self._lengths),
            (other._name, other._lengths),
            "nest them by one list of lengths",
        )

    def nest(self, flat: Tensor) -> Tensor:
        """Convert a result [total, H, Dv] to a strided nested tensor."""
        parts = torch.split(flat, self._lengths)
        if self._rows == 2:
            parts = tuple(part.transpose(0, 1) for part in parts)
        return torch.nested.as_nested_tensor(list(parts))


def _other_layout(keys: str, values: str, one: Tensor, other: Tensor) -> InvalidInputError:
    return InvalidInputError(
        f"{keys} is nested as {one.layout} and {values} as {other.layout}: both must be of one "
        "layout; pass layout=torch.jagged where the other one is nested"
    )


def _check_lengths(
    keys: tuple[str, list[int]], values: tuple[str, list[int]], way_out: str
) -> None:
    """Refuse sequences with different numbers of keys and values."""
    (k, of_k), (v, of_v) = keys, values
    if len(of_k) != len(of_v):
        raise InvalidInputError(
            f"{k} and {v} have {len(of_k)} and {len(of_v)} sequences: they must have as many; "
            f"{way_out}"
        )
    for idx, (own, other) in enumerate(zip(of_k, of_v, strict=True)):
        if own != other:
            raise InvalidInputError(
                f"sequence {idx} has length {own} in {k} and {other} in {v}: every key needs a "
                f"value; {way_out}"
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

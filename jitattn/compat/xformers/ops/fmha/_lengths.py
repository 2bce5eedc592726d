"""Where the sequences of a packed dimension lie: starts, lengths and bounds, on host and device."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from jitattn.compat._errors import check
from jitattn.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Self

    from torch import Tensor


def default_device(device: torch.device | None = None) -> torch.device:
    """Return the device of lengths that are made without one: a GPU where there is any."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return int32 numbers on a device, without a wait for it."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=torch.int32, device="cpu")
    pinned = torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=True)
    return pinned.to(device, non_blocking=True)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; the host waits for none."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def _bounds(lengths: Sequence[int]) -> tuple[int, int]:
    """Return the smallest and the largest length, -1 if there are none, as the original does."""
    return min(lengths, default=-1), max(lengths, default=-1)


@dataclasses.dataclass(eq=False)
class _SeqLenInfo:
    """Sequences one after another.

    Attributes
    ----------
    seqstart : Tensor, [B + 1], int32
        First row of each, and the number of rows.
    max_seqlen, min_seqlen : int
        Bounds on the lengths.
    seqstart_py : list of int
        The contents of `seqstart`.
    """

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    def to(self, device: torch.device | str) -> Self:
        """Return the value on a device."""
        if self.seqstart.device == torch.device(device):
            return self
        tensors: dict[str, Any] = {
            field.name: moved(value, device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each sequence, and the one after its last."""
        yield from zip(self.seqstart_py, self.seqstart_py[1:], strict=False)

    @classmethod
    def from_seqlens(
        cls, seqlens: Iterable[int], *, device: torch.device | None = None
    ) -> _SeqLenInfo:
        """Make the value from lengths on the host."""
        lengths = _on_host("seqlens", seqlens)
        least, most = _bounds(lengths)
        starts = _starts(lengths)
        return _SeqLenInfo(on_device(starts, default_device(device)), most, least, starts)

    def from_seqlens_inplace(self, seqlens: Iterable[int]) -> None:
        """Write other lengths into the value, as many and none larger: for captured graphs."""
        lengths = _on_host("seqlens", seqlens)
        _check_fits(lengths, len(self.seqstart_py) - 1, self.max_seqlen)
        self.seqstart_py[:] = _starts(lengths)
        new = on_device(self.seqstart_py, self.seqstart.device)
        self.seqstart.copy_(new, non_blocking=True)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Split a tensor [1, total, *] into the sequences, or into batches of equal ones.

        Parameters
        ----------
        batch_sizes : sequence of int, default 1 for each sequence
            Numbers of sequences that were one tensor [batch_size, length, *].
        """
        if x.shape[0] != 1 or x.shape[1] != self.seqstart_py[-1]:
            raise InvalidInputError(
                f"tensor has shape {list(x.shape)}: it must be [1, {self.seqstart_py[-1]}, …], all "
                "sequences one after another"
            )
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else list(batch_sizes)
        parts, first = [], 0
        for size in sizes:
            start, stop = self.seqstart_py[first], self.seqstart_py[first + size]
            parts.append(x[:, start:stop].reshape(size, -1, *x.shape[2:]))
            first += size
        return parts


@dataclasses.dataclass(eq=False)
class _PaddedSeqLenInfo(_SeqLenInfo):
    """Sequences that each have room for `padding` rows, and use the first ones.

    Attributes
    ----------
    seqlen : Tensor, [B], int32
        Rows in use.
    seqlen_py : sequence of int
    padding : int
    """

    seqlen: Tensor
    seqlen_py: Sequence[int]
    padding: int

    def __post_init__(self) -> None:
        check(
            len(self.seqstart_py) == len(self.seqlen_py) + 1,
            f"seqstart_py has {len(self.seqstart_py)} entries and seqlen_py "
            f"{len(self.seqlen_py)}: it must have one more",
        )

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Yield the first used row of each sequence, and the one after the last used."""
        for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield start, start + length

    @classmethod
    def from_seqlens(
        cls, seqlens: Iterable[int], *, device: torch.device | None = None
    ) -> _SeqLenInfo:
        """Refuse: there is no padding among the arguments."""
        raise UnsupportedError("use from_seqlens_padded, which takes the padding")

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: torch.device | None = None
    ) -> _PaddedSeqLenInfo:
        """Make the value from lengths on the host, none larger than `padding`."""
        lengths = _on_host("seqlens", seqlens)
        least, most = _bounds(lengths)
        check(most <= padding, f"seqlens {lengths}: none may be larger than the padding, {padding}")
        starts = [number * padding for number in range(len(lengths) + 1)]
        where = default_device(device)
        return cls(
            seqstart=on_device(starts, where),
            max_seqlen=most,
            min_seqlen=least,
            seqstart_py=starts,
            seqlen=on_device(lengths, where),
            seqlen_py=lengths,
            padding=padding,
        )

    def from_seqlens_padded_inplace(self, seqlens: Sequence[int]) -> None:
        """Write other lengths into the value, as many and none larger: for captured graphs."""
        lengths = _on_host("seqlens", seqlens)
        _check_fits(lengths, len(self.seqlen_py), min(self.max_seqlen, self.padding))
        self.seqlen_py = lengths
        self.seqlen.copy_(on_device(lengths, self.seqlen.device), non_blocking=True)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Refuse: rows between sequences belong to none."""
        raise UnsupportedError("padded sequences are not split: x.unflatten(1, (-1, padding))")


@dataclasses.dataclass(eq=False)
class _GappySeqInfo(_SeqLenInfo):
    """Sequences anywhere in the dimension, or, of a paged mask, anywhere in a row of pages.

    Attributes
    ----------
    seqlen : Tensor, [B], int32
        Lengths; of a paged mask, the rows after the last ones.
    seqlen_py : sequence of int
    """

    seqlen: Tensor
    seqlen_py: Sequence[int]

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each sequence, and the one after its last."""
        for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield start, start + length

    @classmethod
    def from_seqlens(
        cls, seqlens: Iterable[int], *, device: torch.device | None = None
    ) -> _SeqLenInfo:
        """Refuse: there are no starts among the arguments."""
        raise UnsupportedError("use from_seqlens_gappy, which takes where sequences start")

    @classmethod
    def from_seqlens_gappy(
        cls, seqstarts: Sequence[int], seqlens: Sequence[int], paged: bool, *, device: torch.device
    ) -> _GappySeqInfo:
        """Make the value from starts and lengths on the host.

        Parameters
        ----------
        seqstarts : sequence of int
            First rows; then the number of rows of the dimension, unless `paged`.
        """
        lengths, starts = _on_host("seqlens", seqlens), list(seqstarts)
        if not lengths or len(starts) != len(lengths) + (not paged):
            raise InvalidInputError(
                f"seqstarts has {len(starts)} entries and seqlens {len(lengths)}: there must be "
                f"sequences, and {'as many starts' if paged else 'one start more'}"
            )
        least, most = _bounds(lengths)
        if paged:
            lengths = [start + length for start, length in zip(starts, lengths, strict=True)]
            starts.append(-1)
        return cls(
            seqstart=on_device(starts, torch.device(device)),
            max_seqlen=most,
            min_seqlen=least,
            seqstart_py=starts,
            seqlen=on_device(lengths, torch.device(device)),
            seqlen_py=lengths,
        )

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Refuse: rows between sequences belong to none."""
        raise UnsupportedError("sequences with gaps are not split: take slices by their starts")


def _on_host(name: str, lengths: Iterable[int]) -> list[int]:
    """Return lengths as a list; a tensor would have to be waited for."""
    check(
        not isinstance(lengths, torch.Tensor),
        f"{name} is a tensor: it must be a list of ints, {name}.tolist()",
    )
    return list(lengths)


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _check_fits(lengths: Sequence[int], count: int, most: int) -> None:
    check(
        len(lengths) == count,
        f"seqlens {list(lengths)}: there are {count} sequences, and must be in place",
    )
    check(
        max(lengths, default=0) <= max(most, 0),
        f"seqlens {list(lengths)}: in place, none may be larger than {most}, as a captured graph "
        "is planned for that",
    )

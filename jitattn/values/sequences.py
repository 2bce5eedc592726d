"""Layouts of sequences that do not fill a dense batch: ragged, padded, paged.

Frozen values over index tensors, which can be copied and pickled; each equals only itself, as
tensors are not compared. Index contents stay on the device, and nothing here synchronizes with it,
except to read the largest length of a `Ragged` without `max_length`, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from jitattn.errors import InternalError, InvalidInputError
from jitattn.spec.enums import CUMULATIVE, LENGTHS, STOPS
from jitattn.values.frozen import Frozen
from jitattn.values.given import integer
from jitattn.values.tensors import NO_ADDRESS, index_address

if TYPE_CHECKING:
    from torch import Tensor

_INDEX_DTYPES: Final = (torch.int32, torch.int64)
_MOST: Final = 2**31


class _Spans(Frozen):
    """Start and end of every sequence: base of all layouts.

    Attributes
    ----------
    cumulative : Tensor, [B + 1], int32 or int64, or None
        Cumulative lengths, from which the other fields follow.
    start : Tensor, [B], int32 or int64, or None
        First row of each sequence; None for 0.
    stop : Tensor, [B]
        Its length, or the row after its last, of the same dtype.
    stop_is_length : bool
        Whether `stop` holds lengths.
    """

    __slots__ = ("_max_length", "_overlaps", "_start", "_stop", "cumulative", "stop_is_length")

    cumulative: Tensor | None
    stop_is_length: bool
    _start: Tensor | None
    _stop: Tensor | None
    _max_length: int | None
    _overlaps: bool | None

    def _set(
        self,
        start: Tensor | None,
        stop: Tensor,
        stop_is_length: bool,
        max_length: int | None,
        name: str,
    ) -> None:
        check_index(f"{name}(length=...)", stop, 1)
        if start is not None:
            check_index(f"{name}(start=...)", start, 1)
            if start.dtype != stop.dtype or start.device != stop.device:
                raise InvalidInputError(
                    f"{name}: start is {start.dtype} on {start.device} and length {stop.dtype} on "
                    f"{stop.device}: they must be alike; cast one with .to()"
                )
            if start.shape != stop.shape:
                raise InvalidInputError(
                    f"{name}: start has {len(start)} entries and length {len(stop)}: both need one "
                    "for every sequence"
                )
        self._hold(name, None, start, stop, stop_is_length, max_length)

    def _set_cumulative(self, cu_seqlens: Tensor, max_length: int | None) -> None:
        check_index("from_cu_seqlens(cu_seqlens=...)", cu_seqlens, 1)
        if not cu_seqlens.numel():
            raise InvalidInputError("cu_seqlens is empty: it has one entry more than sequences")
        self._hold("from_cu_seqlens", cu_seqlens, None, None, False, max_length)

    def _hold(
        self,
        name: str,
        cumulative: Tensor | None,
        start: Tensor | None,
        stop: Tensor | None,
        stop_is_length: bool,
        max_length: int | None,
    ) -> None:
        """Store checked values, except `max_length`."""
        hold = object.__setattr__
        hold(self, "cumulative", cumulative)
        hold(self, "_start", start)
        hold(self, "_stop", stop)
        hold(self, "stop_is_length", stop_is_length)
        if not (type(max_length) is int and 0 <= max_length < _MOST):
            max_length = checked_max_length(name, max_length)
        hold(self, "_max_length", max_length)
        hold(self, "_overlaps", None)

    @property
    def start(self) -> Tensor | None:
        """First rows, [B]; None for 0."""
        return self._start if self.cumulative is None else self.cumulative[:-1]

    @property
    def stop(self) -> Tensor:
        """Lengths, or rows after the last ones, [B]."""
        stop = self._stop if self.cumulative is None else self.cumulative[1:]
        if stop is None:
            raise InternalError("sequences without an end")
        return stop

    @property
    def batch(self) -> int:
        """Number of sequences."""
        if self.cumulative is not None:
            return self.cumulative.shape[0] - 1
        return self.stop.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the indices."""
        return self.stop.device if self.cumulative is None else self.cumulative.device

    @property
    def length(self) -> Tensor:
        """Lengths, [B]; computed by a kernel at each access if stops were given."""
        start = self.start
        return self.stop if self.stop_is_length or start is None else self.stop - start

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the value was made from, by name."""
        names = ("cumulative", "_start", "_stop", "batch_idx", "block_table")
        found = {name.strip("_"): getattr(self, name, None) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def addresses(self) -> tuple[int, int, int, int]:
        """Return addresses of starts (0: none) and stops, words per entry, and the encoding.

        The encoding is `STOPS`, `LENGTHS` or `CUMULATIVE`.
        """
        if self.cumulative is not None:
            size = self.cumulative.element_size()
            first = index_address("cu_seqlens", self.cumulative)
            return first, first if first == NO_ADDRESS else first + size, size // 4, STOPS
        start, stop = self._start, self.stop
        words, kind = stop.element_size() // 4, LENGTHS if self.stop_is_length else STOPS
        first = 0 if start is None else index_address("start", start)
        return first, index_address("length", stop), words, kind


class Ragged(_Spans):
    """Ragged sequences: one after another in one tensor [total, H, D], with or without gaps.

    Row b of the batch is the rows start[b] … start[b] + length[b] - 1. Sequences may overlap, be
    empty, and come in any order.

    Parameters
    ----------
    start : Tensor, [B], int32 or int64
        First row of each sequence, on the device of q.
    length : Tensor, [B], same dtype
        Number of rows of each.
    max_length : int, optional
        Upper bound of the lengths. Without it, the first call reads the largest length from the
        device and waits for it, once per value; a CUDA graph capture forbids that. Tokens beyond a
        bound that is too small are not visible.

    Raises
    ------
    InvalidInputError
        A tensor has an invalid dtype, shape or device, or the tensors do not match.
    """

    __slots__ = ()

    def __init__(self, start: Tensor, length: Tensor, max_length: int | None = None) -> None:
        self._set(start, length, True, max_length, "Ragged")

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_length: int | None = None) -> Ragged:
        """Make the value from cumulative lengths, as FlashAttention has them; launches nothing.

        Parameters
        ----------
        cu_seqlens : Tensor, [B + 1], int32 or int64
            Sequence b is the rows cu_seqlens[b] … cu_seqlens[b + 1] - 1.
        max_length : int, optional
            As in the constructor.
        """
        value = cls.__new__(cls)
        value._set_cumulative(cu_seqlens, max_length)
        if not torch.compiler.is_dynamo_compiling():
            index_address("cu_seqlens", cu_seqlens)  # torch cannot slice freed memory
        return value

    def knows_max_length(self) -> bool:
        """Whether the bound on the lengths is known without a device synchronization."""
        return self._max_length is not None

    def max_length(self) -> int:
        """Return the bound on the lengths; reads it from the device if none was given."""
        longest = self._max_length
        if longest is None:
            longest = max(0, int(self.length.max())) if self.batch else 0
            object.__setattr__(self, "_max_length", longest)
        return longest


class Padded(_Spans):
    """Padded sequences: one per row of a batched tensor, which it need not fill.

    Sequence b is the tokens start[b] … start[b] + length[b] - 1 of row b of [B, L, H, D]. Without
    `start` they begin at 0 (`seqused_k`); with it, padding may lie on the left.

    Parameters
    ----------
    length : Tensor, [B], int32 or int64
        Number of real tokens, on the device of q.
    start : Tensor, [B], same dtype, optional
        First real token.
    max_length : int, default L
        Upper bound of the lengths. A smaller one than L saves work.
    batch_idx : Tensor, [B], int32 or int64, optional
        For k and v: the batch row of each sequence, if it is not its own index. The tensor may then
        have more or fewer rows than there are sequences.

    Raises
    ------
    InvalidInputError
        A tensor has an invalid dtype, shape or device, or the tensors do not match.
    """

    __slots__ = ("batch_idx",)

    batch_idx: Tensor | None

    def __init__(
        self,
        length: Tensor,
        start: Tensor | None = None,
        max_length: int | None = None,
        batch_idx: Tensor | None = None,
    ) -> None:
        self._set_padded(start, length, True, max_length, batch_idx)

    @classmethod
    def from_stop(
        cls,
        stop: Tensor,
        start: Tensor | None = None,
        max_length: int | None = None,
        batch_idx: Tensor | None = None,
    ) -> Padded:
        """Make the value from the token after the last one of each sequence; launches nothing."""
        value = cls.__new__(cls)
        value._set_padded(start, stop, start is None, max_length, batch_idx)
        return value

    def _set_padded(
        self,
        start: Tensor | None,
        stop: Tensor,
        stop_is_length: bool,
        max_length: int | None,
        batch_idx: Tensor | None,
    ) -> None:
        self._set(start, stop, stop_is_length, max_length, "Padded")
        if batch_idx is not None:
            check_index("Padded(batch_idx=...)", batch_idx, 1)
            if len(batch_idx) != len(stop) or batch_idx.device != stop.device:
                raise InvalidInputError(
                    f"Padded: batch_idx has {len(batch_idx)} entries on {batch_idx.device} and "
                    f"length {len(stop)} on {stop.device}: both need one for every sequence"
                )
        object.__setattr__(self, "batch_idx", batch_idx)

    def max_length(self, rows: int) -> int:
        """Return the bound on the lengths in a tensor of `rows` tokens."""
        return rows if self._max_length is None else min(rows, self._max_length)


class Paged(_Spans):
    """Paged KV cache: keys and values in pages of equal size, found through a block table.

    k is [num_pages, page_size, Hkv, D] and v [num_pages, page_size, Hkv, Dv], each with strides of
    its own; both may be views of one tensor. Row t of sequence b is row t % page_size of page
    block_table[b, t // page_size].

    Parameters
    ----------
    block_table : Tensor, [B, max_pages], int32 or int64
        Entries before the first and after the last page of a sequence are never read.
    length : Tensor, [B], int32 or int64
        Number of keys of each sequence.
    max_length : int, default max_pages * page_size
        Upper bound of the lengths. A smaller one saves work and, with gear 4, memory.
    start : Tensor, [B], same dtype as length, optional
        Row of the first key of each sequence, for left padding; 0 if left out.

    Raises
    ------
    InvalidInputError
        A tensor has an invalid dtype, shape or device, or the tensors do not match.
    """

    __slots__ = ("block_table",)

    block_table: Tensor

    def __init__(
        self,
        block_table: Tensor,
        length: Tensor,
        max_length: int | None = None,
        start: Tensor | None = None,
    ) -> None:
        self._set(start, length, True, max_length, "Paged")
        self._set_table(block_table, length.shape[0], length.device)

    @classmethod
    def from_stop(
        cls,
        block_table: Tensor,
        stop: Tensor,
        max_length: int | None = None,
        start: Tensor | None = None,
    ) -> Paged:
        """Make the value from the row after the last key of each sequence; launches nothing."""
        value = cls.__new__(cls)
        value._set(start, stop, start is None, max_length, "Paged")
        value._set_table(block_table, stop.shape[0], stop.device)
        return value

    @classmethod
    def from_cu_seqlens(
        cls, block_table: Tensor, cu_seqlens: Tensor, max_length: int | None = None
    ) -> Paged:
        """Make the value from cumulative lengths, as FlashAttention has them; launches nothing.

        Parameters
        ----------
        cu_seqlens : Tensor, [B + 1], int32 or int64
            Sequence b has cu_seqlens[b + 1] - cu_seqlens[b] keys, the first ones of its pages.
        """
        value = cls.__new__(cls)
        value._set_cumulative(cu_seqlens, max_length)
        value._set_table(block_table, cu_seqlens.shape[0] - 1, cu_seqlens.device)
        return value

    @property
    def start(self) -> Tensor | None:
        """First rows, [B]; None for 0."""
        return self._start

    @property
    def stop(self) -> Tensor:
        """Lengths, computed at each access from cumulative ones; or rows after the last ones."""
        if self.cumulative is not None:
            return self.cumulative[1:] - self.cumulative[:-1]
        if self._stop is None:  # not super().stop: Dynamo takes no property of a base class
            raise InternalError("sequences without an end")
        return self._stop

    def addresses(self) -> tuple[int, int, int, int]:
        """Return addresses of starts (0: none) and stops, words per entry, and the encoding."""
        first, stop, words, kind = super().addresses()
        return first, stop, words, kind if self.cumulative is None else CUMULATIVE

    def _set_table(self, block_table: Tensor, batch: int, device: torch.device) -> None:
        check_index("Paged(block_table=...)", block_table, 2)
        if block_table.shape[0] != batch or block_table.device != device:
            raise InvalidInputError(
                f"Paged: block_table has {len(block_table)} rows on {block_table.device}, but "
                f"there are {batch} sequences, on {device}: it needs a row for each"
            )
        is_dense = block_table.is_contiguous() or block_table.shape[1] <= 1
        if not is_dense and block_table.stride(1) != 1:
            raise InvalidInputError(
                f"Paged: block_table has strides {block_table.stride()}: the last one must be 1; "
                "call .contiguous() first"
            )
        object.__setattr__(self, "block_table", block_table)

    def max_length(self, page_size: int) -> int:
        """Return the bound on the lengths with pages of `page_size` keys."""
        room = self.block_table.shape[1] * page_size
        return room if self._max_length is None else min(room, self._max_length)


QSequences: TypeAlias = Ragged | Padded | None
KvSequences: TypeAlias = Ragged | Padded | Paged | None


def checked_max_length(name: str, max_length: object) -> int | None:
    """Return a bound on lengths as an int; refuse other values."""
    if max_length is None:
        return None
    number = integer(max_length)
    if number is None or not 0 <= number < _MOST:
        raise InvalidInputError(
            f"{name}(max_length={max_length!r}): it must be an int from 0 to 2**31 - 1"
        )
    return number


def check_index(what: str, tensor: object, dimensions: int) -> None:
    """Refuse a value that is not an index tensor."""
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype in _INDEX_DTYPES
        and tensor.dim() == dimensions
        and (dimensions > 1 or tensor.is_contiguous())
    ):
        return
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(f"{what} is a {type(tensor).__name__}: it must be a torch tensor")
    if tensor.dtype not in _INDEX_DTYPES:
        raise InvalidInputError(
            f"{what} is {tensor.dtype}: it must be int32 or int64; cast it with .to(torch.int32)"
        )
    if tensor.dim() != dimensions:
        raise InvalidInputError(
            f"{what} has shape {list(tensor.shape)}: it must have {dimensions} "
            f"dimension{'s' if dimensions > 1 else ''}"
        )
    raise InvalidInputError(
        f"{what} has stride {tensor.stride(0)}: it must be contiguous; call .contiguous() first"
    )


def overlaps(seqs: Ragged | Padded | Paged) -> bool:
    """Return whether sequences of a flat tensor share rows; cumulative lengths cannot.

    Reads the device once per value, but not during a CUDA graph capture, when it returns False.
    """
    if not isinstance(seqs, Ragged) or not seqs.stop_is_length or seqs.start is None:
        return False
    if seqs._overlaps is None:
        if seqs.stop.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        order = seqs.start.argsort()
        start, length = seqs.start[order], seqs.stop[order].clamp(min=0)
        filled = length > 0
        start, stop = start[filled], (start + length)[filled]
        found = bool((start[1:] < stop[:-1].cummax(0).values).any()) if len(start) > 1 else False
        object.__setattr__(seqs, "_overlaps", found)
    return bool(seqs._overlaps)

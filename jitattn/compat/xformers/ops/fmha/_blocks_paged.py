"""Biases over sequences whose keys lie in pages: k is [1, num_pages * page_size, H, D]."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from jitattn.compat._errors import check
from jitattn.compat.xformers.ops.fmha._bias import Translated, as_bias
from jitattn.compat.xformers.ops.fmha._blocks import Blocks
from jitattn.compat.xformers.ops.fmha._lengths import (
    _GappySeqInfo,
    _PaddedSeqLenInfo,
    _SeqLenInfo,
    moved,
)
from jitattn.compat.xformers.ops.fmha._reach import Reach
from jitattn.values.sequences import Paged

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from torch import Tensor


class Pages(Blocks):
    """Base of biases over pages, found through `block_tables` [B, max_pages], int32."""

    block_tables: Tensor
    page_size: int

    def to(self, device: torch.device | str) -> Self:
        """Return the bias with its tensors on a device."""
        new: Self = super().to(device)
        new.block_tables = moved(self.block_tables, device)
        return new

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Return 0 where a key is visible, -inf elsewhere, by the rows of the pages.

        Parameters
        ----------
        shape : tuple of int
            [*, total_q, B * max_pages * page_size].

        Returns
        -------
        Tensor, [*, total_q, pages in use * page_size]
        """
        tables = self.block_tables.tolist()
        room = self.block_tables.shape[1] * self.page_size
        wanted = (self.q_seqinfo.seqstart_py[-1], len(tables) * room)
        check(
            tuple(shape[-2:]) == wanted,
            f"shape={tuple(shape)}: there are {wanted[0]} queries, and pages for {wanted[1]} keys",
        )
        columns = (max(max(table) for table in tables) + 1) * self.page_size
        seen = torch.zeros(wanted[0], columns, dtype=torch.bool, device=device)
        spans = zip(tables, self.q_seqinfo.intervals(), self._rows(), strict=False)
        for table, (q_start, q_stop), (start, stop) in spans:
            own = self._reach().seen(q_stop - q_start, stop - start, device)
            rows = [
                table[row // self.page_size] * self.page_size + row % self.page_size
                for row in range(start, stop)
            ]
            seen[q_start:q_stop, rows] = own
        return as_bias(seen, (*shape[:-1], columns), dtype)

    def _rows(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each sequence in its pages, and the one after its last."""
        raise NotImplementedError

    def _made(self) -> Translated:
        return super()._made()._replace(page_size=self.page_size)

    def _parts(self) -> list[Any]:
        return [*super()._parts(), self.block_tables, self.page_size]

    def _lengths_are_equal(self) -> bool:
        return False


@dataclasses.dataclass(eq=False)
class PagedBlockDiagonalPaddedKeysMask(Pages):
    """`BlockDiagonalPaddedKeysMask` of keys in pages, from their first row on."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo
    block_tables: Tensor
    page_size: int

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: torch.device | None = None,
    ) -> Self:
        """Make the bias from lengths of queries and keys, and the pages of each sequence."""
        where = _checked_device(q_seqlen, kv_seqlen, block_tables, device)
        room = block_tables.shape[1] * page_size
        k_seqinfo = _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, room, device=where)
        q_seqinfo = _SeqLenInfo.from_seqlens(q_seqlen, device=where)
        return cls(q_seqinfo, k_seqinfo, block_tables, page_size)

    def _rows(self) -> Iterator[tuple[int, int]]:
        for length in self.k_seqinfo.seqlen_py:
            yield 0, length

    def _keys(self) -> Paged:
        return Paged(self.block_tables, self.k_seqinfo.seqlen)


@dataclasses.dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """`PagedBlockDiagonalPaddedKeysMask` with every sequence causal from its bottom right."""

    def _reach(self) -> Reach:
        return Reach(None, 0)


@dataclasses.dataclass(eq=False)
class PagedBlockDiagonalGappyKeysMask(Pages):
    """`BlockDiagonalGappyKeysMask` of keys in pages, from any row on."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo
    block_tables: Tensor
    page_size: int

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: torch.device | None = None,
    ) -> Self:
        """Make the bias from lengths, the row of each first key in its pages, and the pages."""
        where = _checked_device(q_seqlen, kv_seqlen, block_tables, device)
        k_seqinfo = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, True, device=where)
        q_seqinfo = _SeqLenInfo.from_seqlens(q_seqlen, device=where)
        return cls(q_seqinfo, k_seqinfo, block_tables, page_size)

    def _rows(self) -> Iterator[tuple[int, int]]:
        yield from zip(self.k_seqinfo.seqstart_py, self.k_seqinfo.seqlen_py, strict=False)

    def _keys(self) -> Paged:
        k = self.k_seqinfo
        return Paged.from_stop(self.block_tables, k.seqlen, start=k.seqstart[:-1])


@dataclasses.dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """`PagedBlockDiagonalGappyKeysMask` with every sequence causal from its bottom right."""

    def _reach(self) -> Reach:
        return Reach(None, 0)


def _checked_device(
    q_seqlen: Sequence[int],
    kv_seqlen: Sequence[int],
    block_tables: Tensor,
    device: torch.device | None,
) -> torch.device:
    """Return the device of the lengths: of the pages, unless another is given."""
    check(
        len(q_seqlen) == len(kv_seqlen) == len(block_tables),
        f"q_seqlen has {len(q_seqlen)} entries, kv_seqlen {len(kv_seqlen)} and block_tables "
        f"{len(block_tables)} rows: all need one for every sequence",
    )
    return block_tables.device if device is None else torch.device(device)

"""Biases over sequences whose keys have room around them: caches, and keys anywhere."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from jitattn.compat._errors import check
from jitattn.compat.xformers.ops.fmha._blocks import Blocks
from jitattn.compat.xformers.ops.fmha._lengths import (
    _GappySeqInfo,
    _PaddedSeqLenInfo,
    _SeqLenInfo,
    default_device,
)
from jitattn.compat.xformers.ops.fmha._reach import Reach
from jitattn.errors import InvalidInputError
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from torch import Tensor

    from jitattn.compat.xformers.ops.fmha._blocks_paged import (
        PagedBlockDiagonalGappyKeysMask,
        PagedBlockDiagonalPaddedKeysMask,
    )


@dataclasses.dataclass(eq=False)
class BlockDiagonalPaddedKeysMask(Blocks):
    """Sequences of queries one after another, each with room for `padding` keys."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,  # noqa: ANN401 - unused there as well
        *,
        device: torch.device | None = None,
    ) -> Self:
        """Make the bias from lengths of queries and keys, and the room of each for keys."""
        del causal_diagonal
        return cls(**_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_paged(
        self,
        block_tables: Tensor,
        page_size: int,
        paged_type: type[PagedBlockDiagonalPaddedKeysMask],
    ) -> PagedBlockDiagonalPaddedKeysMask:
        """Return the bias of the same keys in pages.

        Parameters
        ----------
        block_tables : Tensor, [B, max_pages], int32
        page_size : int
        paged_type : type
            Of the result.
        """
        room = block_tables.shape[1] * page_size
        return paged_type(
            q_seqinfo=self.q_seqinfo,
            k_seqinfo=dataclasses.replace(self.k_seqinfo, padding=room),
            block_tables=block_tables,
            page_size=page_size,
        )

    def make_local_attention(
        self, window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """Return the bias with a window from the bottom right."""
        return BlockDiagonalLocalAttentionPaddedKeysMask(
            self.q_seqinfo, self.k_seqinfo, window_left, window_right
        )

    def _keys(self) -> Ragged:
        # Lengths on the device may grow up to the padding, as they do in captured graphs.
        k = self.k_seqinfo
        return Ragged(k.seqstart[:-1], k.seqlen, k.padding)


@dataclasses.dataclass(eq=False)
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """`BlockDiagonalPaddedKeysMask` with every sequence causal from its bottom right."""

    causal_diagonal: Any = None  #: unused there as well

    def _reach(self) -> Reach:
        return Reach(None, 0)


@dataclasses.dataclass(eq=False)
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """`BlockDiagonalPaddedKeysMask` with a window from the bottom right."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for name in ("window_left", "window_right"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name}={getattr(self, name)}: it must be at least 0")

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> Self:
        """Make the bias from lengths, the room of each for keys, and the window."""
        lengths = _padded(q_seqlen, kv_padding, kv_seqlen, None)
        return cls(**lengths, window_left=window_left, window_right=window_right)

    def _reach(self) -> Reach:
        return Reach(self.window_left, self.window_right)


@dataclasses.dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """`BlockDiagonalPaddedKeysMask` with a causal window of `window_size` keys."""

    _window_size: int

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
    ) -> Self:
        """Make the bias from lengths, the room of each for keys, and the window."""
        return cls(**_padded(q_seqlen, kv_padding, kv_seqlen, None), _window_size=window_size)

    def _reach(self) -> Reach:
        return Reach(self._window_size - 1, 0)


@dataclasses.dataclass(eq=False)
class BlockDiagonalGappyKeysMask(Blocks):
    """Sequences of queries one after another, with keys anywhere in k."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: torch.device | None = None,
    ) -> Self:
        """Make the bias from lengths, and the first key of each; then the number of rows of k."""
        check(
            len(q_seqlen) == len(kv_seqlen),
            f"q_seqlen has {len(q_seqlen)} entries and kv_seqlen {len(kv_seqlen)}: both need one "
            "for every sequence",
        )
        where = default_device(device)
        return cls(
            q_seqinfo=_SeqLenInfo.from_seqlens(q_seqlen, device=where),
            k_seqinfo=_GappySeqInfo.from_seqlens_gappy(
                kv_seqstarts, kv_seqlen, False, device=where
            ),
        )

    def make_paged(
        self,
        block_tables: Tensor,
        page_size: int,
        notional_padding: int,
        paged_type: type[PagedBlockDiagonalGappyKeysMask],
    ) -> PagedBlockDiagonalGappyKeysMask:
        """Return the bias of the same keys in pages.

        Parameters
        ----------
        block_tables : Tensor, [B, max_pages], int32
        page_size : int
        notional_padding : int
            Room of each sequence in the rows that starts count; a multiple of the page size.
        paged_type : type
            Of the result.
        """
        if notional_padding % page_size:
            raise InvalidInputError(
                f"notional_padding={notional_padding}: it must be a multiple of the page size, "
                f"{page_size}"
            )
        k, room = self.k_seqinfo, block_tables.shape[1] * page_size
        rows = [number * notional_padding for number in range(len(k.seqlen_py))]
        starts = [start - row for start, row in zip(k.seqstart_py, rows, strict=False)]
        check(
            all(0 <= start < room for start in starts) and k.max_seqlen <= room,
            f"starts {starts} in rows of {notional_padding}, lengths up to {k.max_seqlen}: they "
            f"must lie in the {room} rows of the pages of a sequence",
        )
        stops = [start + length for start, length in zip(starts, k.seqlen_py, strict=True)]
        # The same on the device, which is not waited for; nobody reads the last start.
        numbers = torch.arange(len(k.seqstart_py), dtype=k.seqstart.dtype, device=k.seqstart.device)
        seqstart = k.seqstart - notional_padding * numbers
        return paged_type(
            q_seqinfo=self.q_seqinfo,
            k_seqinfo=_GappySeqInfo(
                seqstart=seqstart,
                max_seqlen=k.max_seqlen,
                min_seqlen=k.min_seqlen,
                seqstart_py=[*starts, -1],
                seqlen=k.seqlen + seqstart[:-1],
                seqlen_py=stops,
            ),
            block_tables=block_tables,
            page_size=page_size,
        )

    def _keys(self) -> Ragged:
        k = self.k_seqinfo
        return Ragged(k.seqstart[:-1], k.seqlen, max(0, k.max_seqlen))


@dataclasses.dataclass(eq=False)
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """`BlockDiagonalGappyKeysMask` with every sequence causal from its bottom right."""

    def _reach(self) -> Reach:
        return Reach(None, 0)


def _padded(
    q_seqlen: Sequence[int],
    kv_padding: int,
    kv_seqlen: Sequence[int],
    device: torch.device | None,
) -> dict[str, Any]:
    """Return the lengths that all padded biases are made of."""
    check(
        len(q_seqlen) == len(kv_seqlen),
        f"q_seqlen has {len(q_seqlen)} entries and kv_seqlen {len(kv_seqlen)}: both need one for "
        "every sequence",
    )
    where = default_device(device)
    return {
        "q_seqinfo": _SeqLenInfo.from_seqlens(q_seqlen, device=where),
        "k_seqinfo": _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=where),
    }

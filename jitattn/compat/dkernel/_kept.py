"""Caches the masks of a module's pattern for as long as the pattern is unchanged."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Final

import torch

from jitattn.values.masks import BlockSparse
from jitattn.values.write_tracking import Snapshot

if TYPE_CHECKING:
    from torch import Tensor

#: Largest block of a kernel; larger pattern blocks are split.
LARGEST_BLOCK: Final = 128
_MOST_MASKS: Final = 16


class KeptMasks:
    """A cache of pattern masks with one block size."""

    def __init__(self, block_size: int, causal: bool) -> None:
        self._block_size, self._causal = block_size, causal
        #: By construction arguments: the pattern, a snapshot of its version, and the mask.
        self._masks: dict[tuple[object, ...], tuple[Tensor, Snapshot, BlockSparse]] = {}
        #: The pattern, a snapshot of its version, and a padded copy in kernel blocks.
        self._wholes: dict[torch.device, tuple[Tensor, Snapshot | None, Tensor]] = {}

    def mask(self, pattern: Tensor, moved: int = 0, first_row: int | None = None) -> BlockSparse:
        """Return the cached mask of a pattern, or make a new one if the pattern has changed.

        `moved` is the number of rows by which it is shifted down: new rows are empty.
        """
        size = min(self._block_size, LARGEST_BLOCK)
        if torch.compiler.is_compiling():  # operators identify a mask by its pattern's memory
            # An int, not a symbol: a graph is specialized on pattern shapes.
            blocks = self._moved(pattern, operator.index(moved))
            return BlockSparse(blocks, size, self._causal, first_row)
        key = (moved, first_row, id(pattern))  # unique while the pattern is referenced here
        known = self._masks.get(key)
        if known is not None and known[0] is pattern and known[1].still_holds(pattern):
            return known[2]
        snapshot = Snapshot(pattern)
        found = BlockSparse(self._moved(pattern, moved), size, self._causal, first_row)
        if len(self._masks) >= _MOST_MASKS:
            self._masks.clear()
        self._masks[key] = (pattern, snapshot, found)
        return found

    def _moved(self, pattern: Tensor, moved: int) -> Tensor:
        """Return the pattern shifted down, in block sizes of the kernels."""
        factor = max(1, self._block_size // LARGEST_BLOCK)
        if moved == 0 and factor == 1:
            return pattern
        above = (
            max(pattern.shape[1:]) if self._causal and pattern.shape[1] != pattern.shape[2] else 0
        )
        known = self._wholes.get(pattern.device)
        in_graph = torch.compiler.is_compiling()  # versions cannot be read in a graph
        if known is None or known[0] is not pattern or not (in_graph or _holds(known[1], pattern)):
            snapshot = None if in_graph else Snapshot(pattern)
            with torch.inference_mode(False):
                whole = torch.nn.functional.pad(pattern, (0, 0, above, 0))
                if factor > 1:
                    whole = whole.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            known = self._wholes[pattern.device] = (pattern, snapshot, whole)
        whole = known[2]
        return whole[:, (above - moved) * factor :]


def _holds(snapshot: Snapshot | None, pattern: Tensor) -> bool:
    """Return whether a pattern is surely unchanged; unknown for one read only by a graph."""
    return snapshot is not None and snapshot.still_holds(pattern)

"""Masks of a module's pattern, each made once for as long as the pattern is the same."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Final

import torch

from jitattn.masks import BlockSparse

if TYPE_CHECKING:
    from torch import Tensor

#: What kernels take; a larger block of a pattern is several.
LARGEST_BLOCK: Final = 128
_MOST_MASKS: Final = 16
#: Stands for the version of a pattern that a graph has read.
_MADE_IN_GRAPH: Final = -1


class KeptMasks:
    """Masks of patterns in blocks of one size."""

    def __init__(self, block_size: int, causal: bool) -> None:
        self._block_size, self._causal = block_size, causal
        #: By how they were made: the pattern, its version, and the mask.
        self._masks: dict[tuple[object, ...], tuple[Tensor, int, BlockSparse]] = {}
        #: The pattern, its version, and itself in blocks of kernels, with room to be moved in.
        self._wholes: dict[torch.device, tuple[Tensor, int, Tensor]] = {}

    def mask(self, pattern: Tensor, moved: int = 0, first_row: int | None = None) -> BlockSparse:
        """Return the mask of a pattern, the same value as long as the pattern is the same.

        `moved` is by how many rows it is moved down: new rows are empty, those above the top go.
        """
        size = min(self._block_size, LARGEST_BLOCK)
        if torch.compiler.is_compiling():  # operators know a mask by the memory of its pattern
            # An index, not a symbol: shapes of patterns are facts of a graph.
            blocks = self._moved(pattern, operator.index(moved))
            return BlockSparse(blocks, size, self._causal, first_row)
        key = (moved, first_row, pattern.device)
        version = _version(pattern)
        source, known_version, found = self._masks.get(key, (None, 0, None))
        if found is None or source is not pattern or known_version != version:
            blocks = self._moved(pattern, moved)
            found = BlockSparse(blocks, size, self._causal, first_row)
            if len(self._masks) >= _MOST_MASKS:
                self._masks.clear()
            self._masks[key] = (pattern, version, found)
        return found

    def _moved(self, pattern: Tensor, moved: int) -> Tensor:
        """Return the pattern moved down, in blocks that kernels take; a part of what is kept."""
        factor = max(1, self._block_size // LARGEST_BLOCK)
        if moved == 0 and factor == 1:
            return pattern
        above = (
            max(pattern.shape[1:]) if self._causal and pattern.shape[1] != pattern.shape[2] else 0
        )
        source, version, whole = self._wholes.get(pattern.device, (None, 0, None))
        # torch.compile cannot ask for versions.
        now = _MADE_IN_GRAPH if torch.compiler.is_compiling() else _version(pattern)
        if whole is None or source is not pattern or now not in (version, _MADE_IN_GRAPH):
            whole = torch.nn.functional.pad(pattern, (0, 0, above, 0))
            if factor > 1:
                whole = whole.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            self._wholes[pattern.device] = (pattern, now, whole)
        return whole[:, (above - moved) * factor :]


def _version(pattern: Tensor) -> int:
    return 0 if pattern.is_inference() else pattern._version

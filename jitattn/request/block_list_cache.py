"""Caches block lists for as long as the patterns that they were built from exist.

Lists of a `BlockSparse` belong to the memory of its pattern: values made again from the same
tensor, views of it and what operators are handed find them, and they go with the memory. Lists of
rules without tensors are kept by value, up to a size. Nothing is freed that a queued kernel may
read: every stream that uses a list is recorded with torch's allocator.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from jitattn.jit import backend
from jitattn.values.masks import BlockSparse, PerHead
from jitattn.values.write_tracking import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.request.block_lists import BlockLists
    from jitattn.values.masks import Rule

#: Size limit in bytes of the lists of rules without tensors, over all devices.
_MOST_BYTES: Final = 1 << 30

Key: TypeAlias = tuple[Hashable, ...]


def patterns_of(rule: Rule) -> list[Tensor]:
    """Return the pattern tensors of a rule, in order."""
    parts = rule.rules if isinstance(rule, PerHead) else (rule,)
    return [part.pattern for part in parts if isinstance(part, BlockSparse)]


def identity_of(rule: Rule) -> Hashable:
    """Return a cache key for a rule: equal for the same pattern memory, valid while it is alive."""
    if isinstance(rule, PerHead):
        return tuple(identity_of(part) for part in rule.rules)
    if not isinstance(rule, BlockSparse):
        return rule
    pattern = rule.pattern
    memory = pattern.untyped_storage()._cdata
    place = (pattern.data_ptr(), tuple(pattern.shape), pattern.stride())
    return (memory, *place, rule.block_size, rule.causal)


class _Entry:
    """Block lists, and the pattern versions that they were built from."""

    __slots__ = ("lists", "snapshots", "streams")

    def __init__(self, lists: BlockLists, snapshots: list[Snapshot], home: int) -> None:
        self.lists = lists
        self.snapshots = snapshots
        self.streams = {home}

    def still_holds(self, patterns: list[Tensor]) -> bool:
        return all(
            snapshot.still_holds(pattern)
            for snapshot, pattern in zip(self.snapshots, patterns, strict=True)
        )

    def record_use(self, device: torch.device) -> None:
        """Record the current stream with the allocator, which then delays reuse of the memory."""
        if device.type != "cuda":
            return
        stream = backend.active.stream(device.index)
        if stream not in self.streams:
            current = torch.cuda.current_stream(device)
            for tensor in (self.lists.groups, self.lists.spans, self.lists.heads):
                tensor.record_stream(current)
            self.streams.add(stream)


class BlockListCache:
    """A thread-safe cache of block lists by rule, device and lengths."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._lock = threading.RLock()  # reentrant: a finalizer may run while it is held
        self._of_patterns: dict[Key, _Entry] = {}
        #: Cache keys of the lists that depend on a pattern's memory, by that memory.
        self._readers: dict[int, set[Key]] = {}
        self._of_values: OrderedDict[Key, _Entry] = OrderedDict()
        self._most_bytes = most_bytes
        self._bytes = 0
        #: Lists whose addresses are in captured graphs: kept for the life of the process.
        self._captured: list[BlockLists] = []

    def __len__(self) -> int:
        return len(self._of_patterns) + len(self._of_values)

    def find(self, key: Key, rule: Rule, device: torch.device) -> BlockLists | None:
        """Return the cached lists, unless their patterns were written to since."""
        patterns = patterns_of(rule)
        with self._lock:
            entry = (self._of_patterns if patterns else self._of_values).get(key)
            if entry is not None and not patterns:
                self._of_values.move_to_end(key)
        if entry is None or not entry.still_holds(patterns):
            return None
        entry.record_use(device)
        return entry.lists

    def make(
        self, key: Key, rule: Rule, device: torch.device, build: Callable[[], BlockLists]
    ) -> BlockLists:
        """Build lists in the current stream, synchronize, and cache them."""
        patterns = patterns_of(rule)
        snapshots = [Snapshot(pattern) for pattern in patterns]
        stream = 0
        made = build()
        if device.type == "cuda":
            stream = backend.active.stream(device.index)
            torch.cuda.current_stream(device).synchronize()  # from now on any stream may read them
        entry = _Entry(made, snapshots, stream)
        with self._lock:
            if patterns:
                self._keep_with_patterns(key, entry, patterns)
            else:
                self._keep_by_value(key, entry)
        return made

    def pin(self, lists: BlockLists) -> None:
        """Keep lists for the life of the process: a captured graph reads them."""
        with self._lock:
            if not any(lists is pinned for pinned in self._captured):
                self._captured.append(lists)

    def _keep_with_patterns(self, key: Key, entry: _Entry, patterns: list[Tensor]) -> None:
        self._of_patterns[key] = entry
        for pattern in patterns:
            storage = pattern.untyped_storage()  # one Python object for as long as the memory lives
            memory = storage._cdata
            if memory not in self._readers:
                self._readers[memory] = set()
                weakref.finalize(storage, self._drop, memory).atexit = False
            self._readers[memory].add(key)

    def _drop(self, memory: int) -> None:
        with self._lock:
            for key in self._readers.pop(memory, ()):
                self._of_patterns.pop(key, None)

    def _keep_by_value(self, key: Key, entry: _Entry) -> None:
        replaced = self._of_values.pop(key, None)
        self._of_values[key] = entry
        self._bytes += entry.lists.nbytes - (0 if replaced is None else replaced.lists.nbytes)
        while self._bytes > self._most_bytes and len(self._of_values) > 1:
            _, oldest = self._of_values.popitem(last=False)
            self._bytes -= oldest.lists.nbytes

"""Estimates the time and the size of kernels that are to be compiled."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from jitattn.cache.entry import Metadata
from jitattn.spec.kernel_spec import KernelSpec

#: Means of the 2,436 kernels of the compile matrix with NVRTC 13.0, until this cache knows better:
#: of attention kernels, and of the smaller ones that prepare, merge and append.
_ATTENTION: Final = frozenset({"fwd", "fwd_sm90", "bwd", "bwd_scores", "bwd_captured"})
_LARGE_SECONDS, _LARGE_BYTES = 2.0, 94_000
_SMALL_SECONDS, _SMALL_BYTES = 0.21, 21_000


class Estimate(NamedTuple):
    """What kernels may take."""

    seconds: float  #: of one process
    bytes: int


def estimate(specs: Sequence[KernelSpec], known: Iterable[Metadata]) -> list[Estimate]:
    """Estimate each kernel by the mean of its family among `known`, else by typical figures.

    The time of typical figures is scaled to this machine by the kernels that are known.
    """
    times: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, list[int]] = defaultdict(list)
    for metadata in known:
        family = str(metadata.spec.get("family"))
        sizes[family].append(metadata.bytes)
        if metadata.compile_ms > 0:  # archives do not say
            times[family].append(metadata.compile_ms / 1e3)
    typical = sum(_typical(family).seconds * len(found) for family, found in times.items())
    pace = sum(map(sum, times.values())) / typical if typical else 1.0
    estimates = []
    for spec in specs:
        usual, family = _typical(spec.family), spec.family
        seconds = statistics.mean(times[family]) if times[family] else usual.seconds * pace
        size = round(statistics.mean(sizes[family])) if sizes[family] else usual.bytes
        estimates.append(Estimate(seconds, size))
    return estimates


def _typical(family: str) -> Estimate:
    if family in _ATTENTION:
        return Estimate(_LARGE_SECONDS, _LARGE_BYTES)
    return Estimate(_SMALL_SECONDS, _SMALL_BYTES)

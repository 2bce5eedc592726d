"""Times calls on a GPU: CUDA graphs over rotating inputs, interleaved variants, percentiles."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Calls per graph, and so the fewest calls per figure.
_CALLS_PER_GRAPH = 4

#: Calls of one turn on the host: few enough that they never wait for the GPU to take them.
_CALLS_PER_TURN = 20


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of one figure, in microseconds."""

    p20: float
    p50: float
    p80: float


def spread(samples: Sequence[float]) -> Spread:
    """Return the 20th, 50th and 80th percentile."""
    if len(samples) < 2:
        return Spread(samples[0], samples[0], samples[0])
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(cuts[1], cuts[4], cuts[7])


def kernel_times(
    calls: dict[str, Callable[[int], object]], *, sets: int, rounds: int
) -> dict[str, Spread]:
    """Time each call on the GPU; `call(i)` works on input set i of `sets`.

    A graph replays several calls on changing input sets, so that neither host time nor a warm L2
    affects the result; the graphs of all variants alternate, so that clock drift affects all alike.
    """
    graphs = {name: _capture(call, sets) for name, call in calls.items()}
    count = max(_CALLS_PER_GRAPH, sets)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / count)
    return {name: spread(values[1:]) for name, values in samples.items()}  # the first is warm-up


def _capture(call: Callable[[int], object], sets: int) -> torch.cuda.CUDAGraph:
    for index in range(sets):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(max(_CALLS_PER_GRAPH, sets)):
            call(index % sets)
    return graph


def host_times_in_turns(
    calls: dict[str, Callable[[], object]], *, rounds: int
) -> dict[str, Spread]:
    """Time warm calls on the host, up to their return; the variants take turns.

    A turn is a few calls, timed one by one, with the GPU idle before the first: a single call after
    a wait would find the processor's caches as the wait and the other variants left them.
    """
    for call in calls.values():
        for _ in range(50):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            for _ in range(_CALLS_PER_TURN):
                start = time.perf_counter()
                call()
                samples[name].append((time.perf_counter() - start) * 1e6)
    return {name: spread(values) for name, values in samples.items()}

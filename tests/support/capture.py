"""Captures CUDA graphs in tests."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, **arguments: Any) -> Iterator[None]:
    """Capture as `torch.cuda.graph`, without a garbage collection meanwhile.

    A graph of an earlier test that is freed during a capture makes the driver give the capture up.
    """
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **arguments):
            yield
    finally:
        gc.enable()

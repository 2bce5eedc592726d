"""Allocates workspace: patterns for buffers, and counters, which kernels reset.

A launch that splits keys counts its finished CTAs, and a persistent kernel the tiles that its CTAs
have drawn. The last one resets the counter to zero for the next launch in the same stream. Launches
that may run concurrently must not share counters: every stream has its own, and so has every launch
captured in a CUDA graph, for the life of the process. (Two replays of one captured graph may not
run at a time.)
"""

from __future__ import annotations

import threading
from typing import Final

import torch

from jitattn.errors import LaunchError
from jitattn.jit import backend

#: Initial number of counters per stream; it grows on demand.
_FIRST: Final = 4096
#: Counters reserved for captures, during which none can be zeroed.
_FOR_CAPTURES: Final = 1 << 17

#: Bytes of the widest dtype.
_WIDEST: Final = 16

_scalars: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
_of_stream: dict[tuple[int, int], torch.Tensor] = {}
_for_captures: dict[int, tuple[torch.Tensor, int]] = {}
_lock = threading.Lock()


def pattern(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a template from which `torch.empty_like` allocates contiguous tensors of this shape.

    This is the cheapest way to allocate at every call: torch need not parse sizes and options. All
    templates of a dtype expand one element, so they take no memory.
    """
    scalar = _scalars.get((dtype, device))
    if scalar is None:
        scalar = _scalars[dtype, device] = _scalar(dtype, device)
    made = scalar.expand(shape)
    if made.numel() > 1:
        return made
    # With at most one element torch would copy the strides of 0.
    return scalar.as_strided(shape, torch.empty(shape, dtype=dtype, device="meta").stride())


def _scalar(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":  # the emulator's
        return torch.empty((), dtype=dtype, device=device)
    index = backend.active.current_device() if device.index is None else device.index
    return backend.active.reserve(_WIDEST, index)[: dtype.itemsize].view(dtype)[0]


def arrivals(count: int, device_index: int, stream: int) -> int:
    """Return the address of `count` zeroed arrival counters for a launch in a stream.

    Raises
    ------
    LaunchError
        A graph is being captured, and nothing was launched on this device before that.
    """
    if backend.active.is_capturing():
        return _captured(count, device_index)
    found = _of_stream.get((device_index, stream))
    if found is None or found.numel() < count:
        prepare(device_index)
        size = max(_FIRST, 1 << (count - 1).bit_length())
        found = _of_stream[device_index, stream] = _zeros(size, device_index)
    return found.data_ptr()


def prepare(device_index: int) -> None:
    """Allocate the counters for graph captures in advance."""
    if device_index not in _for_captures:
        _for_captures[device_index] = (_zeros(_FOR_CAPTURES, device_index), 0)


def _forget() -> None:
    _scalars.clear()
    _of_stream.clear()
    _for_captures.clear()


def _captured(count: int, device_index: int) -> int:
    with _lock:
        counters, used = _for_captures.get(device_index, (None, 0))
        if counters is not None and used + count <= counters.numel():
            _for_captures[device_index] = (counters, used + count)
            return counters.data_ptr() + 4 * used
    if counters is None:
        raise LaunchError(
            "a call whose kernel counts is captured before any was made on this device; call "
            "jitattn.warmup with the same arguments before the capture"
        )
    # The reserve is used up: the graph zeroes new counters of its own at every replay.
    own = torch.empty(count, dtype=torch.int32, device=torch.device("cuda", device_index))
    backend.active.zero(own.data_ptr(), 4 * count, backend.active.stream(device_index))
    return own.data_ptr()


def _zeros(count: int, device_index: int) -> torch.Tensor:
    # Not torch.zeros, whose kernel takes 4 ms to load in a new process.
    counters = backend.active.reserve(4 * count, device_index).view(torch.int32)
    stream = backend.active.stream(device_index)
    backend.active.zero(counters.data_ptr(), 4 * count, stream)
    return counters


backend.on_change(_forget)

"""Interface to the GPU runtime: streams and devices of torch, kernels of CuPy.

Calls use `backend.active`, whose fields are torch's own C functions, so that a launch makes no
additional Python call. `install` replaces it, for example by the emulator of the tests, and
discards what the process knows of the previous backend's GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.errors import LaunchError
from jitattn.jit import launch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from jitattn.spec.kernel_spec import KernelSpec


def _without_cuda(*_: object) -> Any:  # noqa: ANN401 - stands in for functions of torch._C
    raise LaunchError("this build of torch has no CUDA; install one that has, or use the CPU path")


_CURRENT_STREAM: Final = getattr(torch._C, "_cuda_getCurrentRawStream", _without_cuda)
_CURRENT_DEVICE: Final = getattr(torch._C, "_cuda_getDevice", _without_cuda)


def _reserve(num_bytes: int, device_index: int) -> torch.Tensor:
    """Return memory [num_bytes] of uint8 that torch's allocator does not know.

    The allocator may have been told to serve a pool, as it is while torch.compile warms up for
    CUDA graphs, and what lasts must not lie there.
    """
    cupy = launch.import_cupy()
    with cupy.cuda.Device(device_index):
        start = cupy.cuda.MemoryPointer(cupy.cuda.Memory(num_bytes), 0)
        return torch.utils.dlpack.from_dlpack(cupy.ndarray((num_bytes,), cupy.uint8, start))


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Functions of the GPU runtime that calls use."""

    #: Raw handle of torch's current stream on a device.
    stream: Callable[[int], int] = _CURRENT_STREAM
    #: Index of the current device of the thread.
    current_device: Callable[[], int] = _CURRENT_DEVICE
    #: Whether the current stream is capturing a CUDA graph.
    is_capturing: Callable[[], bool] = torch._C._cuda_isCurrentStreamCapturing
    #: Whether the process was forked from one that had used CUDA.
    is_in_bad_fork: Callable[[], bool] = torch.cuda._is_in_bad_fork
    #: Context manager that makes a device current.
    on_device: Callable[[int | torch.device], AbstractContextManager[None]] = torch.cuda.device
    #: Name, compute capability and multiprocessors of a device.
    properties: Callable[[int], Any] = torch.cuda.get_device_properties
    #: Kernel of a spec on a device: loaded already, from the cache, or compiled.
    load: Callable[[KernelSpec, int], launch.Kernel] = launch.kernel
    #: Whether `load` would return without loading.
    is_loaded: Callable[[KernelSpec, int], bool] = launch.is_loaded
    #: Whether the driver encodes tensor maps, which kernels with TMA take.
    encodes_maps: Callable[[], bool] = launch.encodes_maps
    #: Memory that lasts, outside of torch's allocator: bytes, device.
    reserve: Callable[[int, int], torch.Tensor] = _reserve
    #: Sets bytes of device memory to zero: address, bytes, stream.
    zero: Callable[[int, int, int], object] = launch.zero


#: The backend of this process.
active = Backend()
_forget: list[Callable[[], object]] = []


def install(backend: Backend) -> Backend:
    """Make later calls use another backend; return the previous one."""
    global active
    before, active = active, backend
    _forget_all()
    return before


def on_change(forget: Callable[[], object]) -> None:
    """Register a function to call when knowledge of the GPUs becomes invalid.

    That happens when the backend changes, and in a forked child, which cannot use its parent's GPU
    memory.
    """
    _forget.append(forget)


def _forget_all() -> None:
    for forget in _forget:
        forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)

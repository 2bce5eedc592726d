"""Kernels for launches: found, compiled and loaded if need be, unless a graph is captured."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from jitattn.errors import LaunchError
from jitattn.jit import backend, launch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from jitattn.spec.kernel_spec import KernelSpec

_NOTHING: Final = contextlib.nullcontext()


def on_gpu(device_index: int) -> AbstractContextManager[None]:
    """Return a context in which a GPU is the current one; free where it is."""
    if device_index == backend.active.current_device():
        return _NOTHING
    return backend.active.on_device(device_index)


def loaded_kernel(spec: KernelSpec, device_index: int) -> launch.Kernel:
    """Return a kernel, compiled and loaded if need be and if that is possible now.

    Raises
    ------
    LaunchError
        The kernel is not loaded, and the current stream is capturing a graph.
    """
    if not backend.active.is_loaded(spec, device_index) and backend.active.is_capturing():
        raise LaunchError(
            f"the {spec.family} kernel of this call is not loaded, and the current stream is "
            "capturing a CUDA graph: compiling and loading are not possible then; call "
            "jitattn.warmup with the same arguments before the capture"
        )
    return backend.active.load(spec, device_index)

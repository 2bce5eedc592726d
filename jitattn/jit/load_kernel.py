"""Loads kernels for launches, compiling on first use; never during a graph capture."""

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
    """Return a context in which a GPU is current; a null context if it is already."""
    if device_index == backend.active.current_device():
        return _NOTHING
    return backend.active.on_device(device_index)


def load_kernel(spec: KernelSpec, device_index: int) -> launch.Kernel:
    """Load a kernel, compiling on first use.

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

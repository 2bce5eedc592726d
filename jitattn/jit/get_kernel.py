"""Kernels for launches: found, compiled and loaded if need be, unless a graph is captured."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import torch

from jitattn.errors import LaunchError
from jitattn.jit import launch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from jitattn.spec.kernel_spec import KernelSpec

_NOTHING: Final = contextlib.nullcontext()


def on_gpu(device_index: int) -> AbstractContextManager[None]:
    """Return a context in which a GPU is the current one; free where it is."""
    if device_index == torch._C._cuda_getDevice():
        return _NOTHING
    return torch.cuda.device(device_index)


def loaded_kernel(spec: KernelSpec, device_index: int) -> launch.Kernel:
    """Return a kernel, compiled and loaded if need be and if that is possible now.

    Raises
    ------
    LaunchError
        The kernel is not loaded, and the current stream is capturing a graph.
    """
    if not launch.is_loaded(spec, device_index) and torch.cuda.is_current_stream_capturing():
        raise LaunchError(
            f"the {spec.family} kernel of this call is not loaded, and the current stream is "
            "capturing a CUDA graph: compiling and loading are not possible then; call "
            "jitattn.warmup with the same arguments before the capture"
        )
    return launch.kernel(spec, device_index)

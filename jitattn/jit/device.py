"""The GPUs of this process, as far as kernels care."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

from jitattn.errors import UnsupportedError

#: cudaDevAttrComputeCapabilityMajor and its kin.
_MAJOR: Final = 75
_MINOR: Final = 76
_MULTIPROCESSORS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU."""

    index: int
    arch: str  #: "sm_90"
    num_sms: int


@functools.cache
def device(index: int) -> Device:
    """Return the GPU with this CUDA index.

    Raises
    ------
    UnsupportedError
        The GPU is older than sm_80.
    """
    from jitattn.jit.launch import import_cupy

    # Single attributes: all properties together take more than a millisecond.
    ask = import_cupy().cuda.runtime.deviceGetAttribute
    return Device(
        index=index,
        arch=arch_of(ask(_MAJOR, index), ask(_MINOR, index)),
        num_sms=ask(_MULTIPROCESSORS, index),
    )


@functools.cache
def device_name(index: int) -> str:
    """Return what the GPU with this CUDA index is called."""
    from jitattn.jit.launch import import_cupy

    name: bytes = import_cupy().cuda.runtime.getDeviceProperties(index)["name"]
    return name.decode()


def arch_of(major: int, minor: int) -> str:
    """Name the architecture of a compute capability; refuse what has no cp.async.

    Raises
    ------
    UnsupportedError
        The capability is below 8.0.
    """
    if major < 8:
        raise UnsupportedError(
            f"this GPU is sm_{major}{minor}: jitattn needs sm_80 or newer (cp.async and bf16 MMA); "
            "move q, k and v to the CPU to use the CPU path"
        )
    return f"sm_{major}{minor}"

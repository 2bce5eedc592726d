"""The GPUs of this process, as far as kernels care."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from jitattn.errors import UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU."""

    index: int
    name: str
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

    properties = import_cupy().cuda.runtime.getDeviceProperties(index)
    arch = arch_of(properties["major"], properties["minor"])
    return Device(
        index=index,
        name=properties["name"].decode(),
        arch=arch,
        num_sms=properties["multiProcessorCount"],
    )


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

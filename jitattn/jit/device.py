"""Describes the GPUs of this process: architecture and multiprocessors.

The properties come from torch, which has them in memory: CuPy's first query of a device takes 0.2
to 1.3 ms of the first call.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from jitattn.errors import UnsupportedError
from jitattn.jit import backend
from jitattn.values.gears import FAST_FP16_ACC_ARCHS


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Properties of a GPU that kernels depend on."""

    index: int
    name: str
    arch: str  #: "sm_90"
    num_sms: int

    @property
    def has_fast_fp16_acc(self) -> bool:
        """Whether fp16 accumulators are faster: on GeForce cards, not on others with that chip."""
        return self.arch in FAST_FP16_ACC_ARCHS and "GeForce" in self.name


@functools.cache
def device(index: int) -> Device:
    """Return the GPU of a CUDA index.

    Raises
    ------
    UnsupportedError
        The GPU is older than sm_80.
    """
    properties = backend.active.properties(index)
    return Device(
        index=index,
        name=properties.name,
        arch=arch_of(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
    )


backend.on_change(device.cache_clear)


def arch_of(major: int, minor: int) -> str:
    """Return the architecture of a compute capability; refuse those without cp.async.

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

"""Plans as data: kernels in order, the memory between them, and every argument by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jitattn.spec.kernel_spec import KernelSpec


class Device(Protocol):
    """Facts of a GPU that plans depend on."""

    @property
    def arch(self) -> str:
        """Architecture, "sm_90"."""
        ...

    def slots(self, spec: KernelSpec) -> int:
        """CTAs of a kernel that the GPU holds at a time; loads the kernel if need be."""
        ...


class Place(NamedTuple):
    """An address that is known at run time: that of an operand of the call, or in a buffer."""

    name: str
    offset: int = 0  #: in bytes


class Buffer(NamedTuple):
    """Device memory that a plan needs for one run."""

    shape: tuple[int, ...]
    dtype: str  #: "fp32", "fp16", "int8" or "int32"
    is_zeroed: bool = False

    def strides(self) -> tuple[int, int, int]:
        """Return (batch, row, head) of a [B, H, L, ...] buffer; 0 where no index passes."""
        batch, heads, rows = self.shape[:3]
        width = 1
        for size in self.shape[3:]:
            width *= size
        return (
            heads * rows * width if batch > 1 else 0,
            width if rows > 1 else 0,
            rows * width if heads > 1 else 0,
        )


class Step(NamedTuple):
    """One launch."""

    spec: KernelSpec
    grid: int
    numbers: Mapping[str, float]  #: arguments that are known
    places: Mapping[str, Place]  #: arguments that are known at run time


class Plan(NamedTuple):
    """Launches in order."""

    steps: tuple[Step, ...]
    buffers: Mapping[str, Buffer]
    num_counters: int = 0  #: of `Place("counters")`: zeros, which the kernels set back

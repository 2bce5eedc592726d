"""Launch plans as data: ordered kernels, intermediate buffers, and all arguments by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jitattn.jit.tensor_maps import BoxedTensor
    from jitattn.spec.kernel_spec import KernelSpec


class Device(Protocol):
    """GPU properties that plans depend on."""

    @property
    def arch(self) -> str:
        """Architecture, "sm_90"."""
        ...

    @property
    def has_wgmma(self) -> bool:
        """Whether calls may take the wgmma kernels of sm_90."""
        ...

    def slots(self, spec: KernelSpec) -> int:
        """Return the CTAs of a kernel that fit the GPU at once; loads the kernel if necessary."""
        ...


class Place(NamedTuple):
    """An address resolved at run time: of an operand, or in a buffer."""

    name: str
    offset: int = 0  #: in bytes


class Buffer(NamedTuple):
    """A device buffer that a plan allocates for one run."""

    shape: tuple[int, ...]
    dtype: str  #: "fp32", "fp16", "int8", "int32" or "int64"
    is_zeroed: bool = False

    def strides(self) -> tuple[int, int, int]:
        """Return (batch, row, head) strides of a [B, H, L, ...] buffer; 0 for size-1 dimensions."""
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
    """One kernel launch."""

    spec: KernelSpec
    grid: int
    numbers: Mapping[str, float]  #: constant arguments
    places: Mapping[str, Place]  #: arguments resolved at run time
    maps: tuple[tuple[str, BoxedTensor], ...] = ()  #: arguments of which the kernel takes a map


class Plan(NamedTuple):
    """Kernel launches in order, with their buffers."""

    steps: tuple[Step, ...]
    buffers: Mapping[str, Buffer]
    num_counters: int = 0  #: of `Place("counters")`: zeros, reset by the kernels

"""The backward postprocess kernel: rounds fp32 sums of dQ, in MMA fragment order, to dQ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Dtype, MatrixSize
from jitattn.spec.kernel_spec import KernelSpec, padded_head_dim

#: Converts fp32 sums of dQ in fragment order to dQ. A row is a query of one head.
BWD_POSTPROCESS: Final = ArgumentStruct(
    "BwdPostprocessParams",
    (
        Argument("sum", "const float*", "[B, Hq, ceil(Lq / block_q) * block_q, Dpad]"),
        Argument("dq", "void*", "[B, Lq, Hq, D], contiguous and aligned to 16 bytes"),
        Argument("unscale", "const float*", "multiplies the result; null: 1"),
        *strides("sum", "batch", "head"),
        *strides("dq", "batch", "row", "head"),
        Argument("num_rows", "int64_t", "B * Lq * Hq"),
        Argument("len_q", "int32_t"),
        Argument("heads_q", "int32_t"),
        Argument("scale", "float"),
        Argument("first_position", "int32_t", "rows of the first tile before query 0"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BwdPostprocessSpec(KernelSpec):
    """Spec of the backward postprocess kernel."""

    family: ClassVar[str] = "bwd_postprocess"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(BWD_POSTPROCESS)
    derived: ClassVar[tuple[str, ...]] = ("column_tiles",)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    head_dim: int
    block_q: int  #: of the backward kernel
    num_warps: int
    warps_dq: int
    arch: str

    @property
    def column_tiles(self) -> int:
        """Return the number of 16x8 tiles that a warp rounds."""
        return 4 if padded_head_dim(self.head_dim) % 32 == 0 else 2

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        del arch, size
        return iter(())  # `BwdSpec` lists them: their fields are of its tile

"""The L2 normalisation kernels: unit-length q and k by groups of columns, and the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides
from jitattn.spec.enums import Access, Dtype, MatrixSize
from jitattn.spec.kernel_spec import KernelSpec

#: q is [B, Lq, Hq, D] and so is k; the results are contiguous. A slice is a group of a vector.
NORM: Final = ArgumentStruct(
    "NormParams",
    (
        Argument("q", "const void*"),
        Argument("k", "const void*"),
        Argument("q_out", "void*"),
        Argument("k_out", "void*"),
        Argument("head_scale", "const float*", "[Hq], for q; null: 1"),
        *strides("q", "batch", "row", "head"),
        *strides("k", "batch", "row", "head"),
        Argument("num_slices_q", "int64_t"),
        Argument("num_slices_k", "int64_t"),
        Argument("len_q", "int32_t"),
        Argument("len_k", "int32_t"),
        Argument("heads_q", "int32_t"),
        Argument("heads_k", "int32_t"),
        Argument("scale_stride_row", "int32_t", '1 where "rows" are heads, [B, Hq, Lq, D],'),
        Argument("scale_stride_head", "int32_t", "and 0 here then"),
    ),
)

#: The gradient of q or k; a slice as above, the gradient and dx contiguous.
NORM_GRAD: Final = ArgumentStruct(
    "NormGradParams",
    (
        Argument("x", "const void*", "[B, L, H, D]"),
        Argument("d_y", "const void*", "of the normalised"),
        Argument("dx", "void*"),
        Argument("head_scale", "const float*", "[H]; null: 1"),
        Argument(
            "d_scale",
            "float*",
            "[num_slices]: what each adds to the gradient of its scale; may be null",
        ),
        *strides("x", "batch", "row", "head"),
        Argument("num_slices", "int64_t"),
        Argument("len", "int32_t"),
        Argument("heads", "int32_t"),
        Argument("scale_stride_row", "int32_t", "as NormParams"),
        Argument("scale_stride_head", "int32_t"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfSlices(KernelSpec):
    """Common fields of the normalisation kernels; a slice is one group of a vector."""

    derived: ClassVar[tuple[str, ...]] = ("lanes",)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    head_dim: int
    groups: int
    access: Access
    arch: str

    @property
    def lanes(self) -> int:
        """Return the lanes per slice: a power of two, with at least one access each."""
        size = self.head_dim // self.groups
        wide = 16 // self.dtype.bytes
        is_wide = self.access is Access.VEC16 and size % wide == 0
        accesses = size // wide if is_wide else size
        return min(32, 1 << (accesses.bit_length() - 1))

    def fault(self) -> str | None:
        """Explain the field that no kernel supports; None if all are supported."""
        reason = KernelSpec.fault(self)
        if reason is None and self.head_dim % self.groups:
            return f"groups={self.groups}: it must divide head_dim={self.head_dim}"
        return reason

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        del size
        for dtype in (Dtype.BF16, Dtype.FP32):
            for groups in (1, 8):
                for access in Access:
                    yield cls(dtype=dtype, head_dim=64, groups=groups, access=access, arch=arch)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec(_OfSlices):
    """Spec of the kernel that scales q and k to unit length, by groups of columns."""

    family: ClassVar[str] = "norm"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(NORM)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormGradSpec(_OfSlices):
    """Spec of the kernel for the gradient of the normalisation, of q or k."""

    family: ClassVar[str] = "norm_grad"
    arguments: ClassVar[ArgumentTable] = ArgumentTable(NORM_GRAD)

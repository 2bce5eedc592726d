"""The mask-lists kernel: makes block lists of a traced mask, on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from jitattn.errors import UnsupportedError
from jitattn.kernels.fwd_arguments import function_struct
from jitattn.kernels.matrix import SLOPES_AND_TABLE
from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable
from jitattn.spec.enums import MatrixSize
from jitattn.spec.kernel_spec import KernelSpec
from jitattn.spec.program import parse

MASK_LISTS: Final = ArgumentStruct(
    "MaskListsParams",
    (
        Argument("list_groups", "int2*", "[num_lists, list_tiles, tile_groups], in order"),
        Argument("list_spans", "int2*", "[num_lists, list_tiles], as BlockListArguments"),
        Argument("list_heads", "int4*", "[2, Hq], likewise"),
        Argument("num_lists", "int32_t", "1 or Hq"),
        Argument("list_tiles", "int32_t"),
        Argument("list_log2", "int32_t", "of the rows of a tile, 64 or 128"),
        Argument("tile_groups", "int32_t", "room for groups of 16 keys"),
        Argument("heads_q", "int32_t"),
        Argument("batch", "int32_t", "sequences to look at"),
        Argument("len_q", "int32_t"),
        Argument("len_kv", "int32_t"),
        Argument("shift", "int32_t", "Lkv - Lq"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskListsSpec(KernelSpec):
    """Spec of the kernel that makes block lists of a mask."""

    family: ClassVar[str] = "mask_lists"
    sees_only: ClassVar[bool] = True
    num_threads: ClassVar[int] = 512
    function: str  #: program with a mask
    arch: str

    def fault(self) -> str | None:
        """Explain the field that no kernel supports; None if all are supported."""
        reason = KernelSpec.fault(self)
        if reason is not None:
            return reason
        if self.function and parse(self.function).mask is not None:
            return None
        return f"function={self.function!r}: mask_lists kernels need a program with a mask"

    @property
    def arguments(self) -> ArgumentTable:
        """Return the parameter struct of this kernel."""
        return _table(self.function)

    @classmethod
    def tables(cls) -> tuple[ArgumentTable, ...]:
        """Return the parameter struct of the compile matrix's function: each has its own."""
        return (_table(parse(SLOPES_AND_TABLE)._replace(score=None).text()),)

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the compile-matrix specs of this family."""
        del size
        yield mask_lists_spec(SLOPES_AND_TABLE, arch)


@functools.lru_cache(1024)
def _table(function: str) -> ArgumentTable:
    return ArgumentTable(MASK_LISTS, function_struct(function))


@functools.lru_cache(1024)
def mask_lists_spec(function: str, arch: str) -> MaskListsSpec:
    """Return the spec of the kernel for the mask of a program.

    Raises
    ------
    UnsupportedError
        The program has no mask.
    """
    program = parse(function)
    if program.mask is None:
        raise UnsupportedError(f"family mask_lists with function={function!r}: it has no mask")
    return MaskListsSpec(function=program._replace(score=None).text(), arch=arch)

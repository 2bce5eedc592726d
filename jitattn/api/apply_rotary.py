"""`apply_rotary`: rotary position embedding of queries or keys; see its docstring."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import Function

from jitattn.cpu.rotary import Positions, apply_rotary_cpu
from jitattn.errors import InvalidInputError
from jitattn.run.forward import is_followed
from jitattn.run.indirect import in_transform
from jitattn.run.rotary import Rotation, by_heads, rotary_spec, rotate_cuda, rotate_followed
from jitattn.run.rotary_operators import WHOLE
from jitattn.spec.enums import Access
from jitattn.values.rotary import Rotary
from jitattn.values.sequences import check_index
from jitattn.values.tensors import DTYPES, is_transformed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jitattn.kernels.rotary import RotarySpec
    from jitattn.run.rotary import Index, Part

_MAX_COUNT: Final = 2**31 - 1


def apply_rotary(
    x: Tensor,
    rotary: Rotary,
    *,
    offset: Tensor | int = 0,
    cu_seqlens: Tensor | None = None,
    layout: str = "bshd",
    inplace: bool = False,
) -> Tensor:
    """Apply rotary position embedding in fp32, rounded once.

    Su et al., "RoFormer", arXiv:2104.09864. On a GPU this launches one kernel, and one more for
    the gradient, without synchronization. (`attention_with_kvcache` can rotate what it appends.)

    Parameters
    ----------
    x : Tensor, [B, L, H, D], or [total, H, D] with `cu_seqlens`
        fp16, bf16 or fp32, any strides. For fp64, and for tables that require grad, PyTorch
        operations compute the result on a GPU too; fp64 in fp64.
    rotary : Rotary
        The tables, of any floating dtype. Columns of x from rotary_dim on stay as they are.
    offset : int or Tensor [B], int32 or int64
        Position of the first row of each sequence.
    cu_seqlens : Tensor, [B + 1], int32 or int64, optional
        Sequence b is the rows cu_seqlens[b] … cu_seqlens[b + 1] - 1.
    layout : "bshd" or "bhsd"
        With "bhsd", x is [B, H, L, D].
    inplace : bool
        Write the result to x. The returned tensor shares its memory and has the gradient; x may be
        a leaf that requires grad. An earlier operation that saved x for backward raises there, as
        after any write.

    Returns
    -------
    Tensor, as x
        Rows of no sequence, and rows at positions beyond the tables, are unchanged.

    Raises
    ------
    InvalidInputError
        An argument breaks a rule, or the tables are too short (if that is known without device
        synchronization). Nothing was written.
    UnsupportedError, CompileError, LaunchError, CacheMissError
        As `attention`.

    Notes
    -----
    Differentiable in x any number of times, and in the tables (but not `inplace`).

    Examples
    --------
    >>> import torch, jitattn
    >>> angle = torch.outer(torch.arange(100.0), 10000 ** (-torch.arange(8) / 8))
    >>> rotary = jitattn.Rotary(angle.cos(), angle.sin(), interleaved=False)
    >>> q = torch.randn(2, 5, 4, 16)
    >>> jitattn.apply_rotary(q, rotary, offset=3).shape
    torch.Size([2, 5, 4, 16])
    """
    if layout not in ("bshd", "bhsd"):
        raise InvalidInputError(f"layout={layout!r}: it must be 'bshd' or 'bhsd'")
    if isinstance(x, Tensor) and x.dim() != (4 if cu_seqlens is None else 3):
        rule = "[B, L, H, D]" if cu_seqlens is None else "[total, H, D] with cu_seqlens"
        raise InvalidInputError(f"x has shape {list(x.shape)}: it must be {rule}")
    if layout == "bhsd" and cu_seqlens is None and isinstance(x, Tensor):
        turned = rotate(x.transpose(1, 2), (rotary,), offset, None, WHOLE, inplace=inplace)
        return turned.transpose(1, 2)
    return rotate(x, (rotary,), offset, cu_seqlens, WHOLE, inplace=inplace)


def rotate(
    x: Tensor,
    tables: Sequence[Rotary],
    offset: Tensor | int,
    cu_seqlens: Tensor | None,
    parts: tuple[Part, ...],
    kept: tuple[Index, ...] = (),
    *,
    inplace: bool,
) -> Tensor:
    """Rotate parts of a tensor, such as q and k of a packed qkv, and return the whole.

    Parameters
    ----------
    tables : sequence of Rotary
        Tables that `parts` refer to by index, of one dtype, all interleaved or none.
    parts, kept
        Together they cover x, each element once (`rotary_cuda.Rotation`).
    x, offset, cu_seqlens, inplace
        As in `apply_rotary`.
    """
    positions = _check(x, tables, offset, cu_seqlens)
    if inplace:
        _check_writable(x)
    flat = [table for rotary in tables for table in (rotary.cos, rotary.sin)]
    if torch.compiler.is_compiling() or _is_fake(x):
        return _traced(x, tables, positions, parts, inplace=inplace)
    if not (x.is_cuda and _has_kernel(x, flat)):
        result = _composed(x, tables, positions, parts)
        return _in_place_of(x, result) if inplace else result
    flat = [table if table.dtype in DTYPES else table.float() for table in flat]
    rotation = Rotation(parts, kept, positions.offset, tables[0].interleaved, False, inplace)
    compute = rotate_followed if is_followed(x) else rotate_cuda
    return compute(x, positions.offsets, cu_seqlens, rotation, *flat)


def rotary_specs(dtype: torch.dtype, rotary: Rotary, arch: str) -> list[RotarySpec]:
    """Return the specs that `apply_rotary` may need, forward and backward."""
    table_dtype = rotary.cos.dtype if rotary.cos.dtype in DTYPES else torch.float32
    return [
        rotary_spec(dtype, table_dtype, rotary.interleaved, access, arch)
        for access in Access
        if dtype in DTYPES
    ]


# ---- Checks


def _check(
    x: Tensor, tables: Sequence[Rotary], offset: Tensor | int, cu_seqlens: Tensor | None
) -> Positions:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInputError(f"x is {what}: it must be a tensor of floating point")
    batch, length = x.shape[0], x.shape[1]
    if cu_seqlens is not None:
        check_index("cu_seqlens", cu_seqlens, 1)
        if not cu_seqlens.shape[0]:
            raise InvalidInputError("cu_seqlens is empty: it has one entry more than sequences")
        batch, length = cu_seqlens.shape[0] - 1, x.shape[0]
    if x.shape[0] * (1 if cu_seqlens is not None else length) > _MAX_COUNT:
        raise InvalidInputError(f"x has shape {list(x.shape)}: it must have fewer than 2**31 rows")
    positions = _positions(offset, cu_seqlens, batch)
    for name, index in (("cu_seqlens", cu_seqlens), ("offset", positions.offsets)):
        if index is not None and index.device != x.device:
            raise InvalidInputError(
                f"{name} is on {index.device}, x is on {x.device}: they must be on one device; "
                "move it with .to()"
            )
    last = None if cu_seqlens is not None else positions.offset + length - 1
    for rotary in tables:
        _check_tables(x, rotary, last)
    return positions


def _positions(offset: Tensor | int, cu_seqlens: Tensor | None, batch: int) -> Positions:
    if isinstance(offset, Tensor):
        check_index("offset", offset, 1)
        if offset.shape[0] != batch:
            raise InvalidInputError(
                f"offset has {len(offset)} entries: it must have one for each of the {batch} "
                "sequences"
            )
        return Positions(0, offset, cu_seqlens)
    try:
        first = operator.index(offset)
    except TypeError as error:
        raise InvalidInputError(f"offset={offset!r}: it must be an int or a tensor [B]") from error
    if not 0 <= first <= _MAX_COUNT:
        raise InvalidInputError(f"offset={first}: it must be from 0 to 2**31 - 1")
    return Positions(first, None, cu_seqlens)


def _check_tables(x: Tensor, rotary: Rotary, last: int | None) -> None:
    """Check tables; `last` is the position of the last row, or a lower bound of it."""
    if not isinstance(rotary, Rotary):
        raise InvalidInputError(
            f"rotary is a {type(rotary).__name__}: it must be Rotary(cos, sin, interleaved=...)"
        )
    table = rotary.cos
    if not table.is_floating_point() or table.device != x.device:
        raise InvalidInputError(
            f"Rotary: the tables are {table.dtype} on {table.device}; they must be of floating "
            f"point, on {x.device}"
        )
    if rotary.rotary_dim > x.shape[-1]:
        raise InvalidInputError(
            f"Rotary: the tables turn {rotary.rotary_dim} columns, but head_dim is {x.shape[-1]}; "
            "slice them to [:, : head_dim // 2]"
        )
    if last is not None and last >= table.shape[0] and x.numel():
        raise InvalidInputError(
            f"Rotary: the tables have {table.shape[0]} positions, but x has rows up to position "
            f"{last}; make them longer"
        )


def _check_writable(x: Tensor) -> None:
    if any(size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True)):
        raise InvalidInputError(
            f"x has strides {tuple(x.stride())} for shape {list(x.shape)}: inplace writes to it, "
            "and its elements must not overlap; call .contiguous(), or leave out inplace"
        )


# ---- PyTorch's operations


def _is_fake(x: Tensor) -> bool:
    """Return whether a tensor has a shape and a device, but no memory."""
    return type(x) is not Tensor and is_fake(x)


def _has_kernel(x: Tensor, tables: Sequence[Tensor]) -> bool:
    """Return whether a kernel computes result and gradients of a tensor on a GPU."""
    wants = torch.is_grad_enabled() and any(table.requires_grad for table in tables)
    is_constant = in_transform() and not is_transformed(x)  # results would be wrapped tensors
    return x.dtype in DTYPES and not wants and not is_constant


def _composed(
    x: Tensor,
    tables: Sequence[Rotary],
    positions: Positions,
    parts: tuple[Part, ...],
    turn: Callable[[Tensor, Rotary, Positions], Tensor] = apply_rotary_cpu,
) -> Tensor:
    """Rotate part by part, out of place, in PyTorch operations."""
    if parts is WHOLE:
        return turn(x, tables[0], positions)
    result = x.clone()
    for place, number in parts:
        own = x[place]
        flat = own.flatten(2, 3) if own.dim() == 5 else own
        result[place] = turn(flat, tables[number], positions).reshape(own.shape)
    return result


class _Held(Function):
    """In-place result: writes it to x and passes its gradient on."""

    @staticmethod
    def forward(result: Tensor, x: Tensor) -> Tensor:
        """Write the result to x; autograd treats the return value as a view of x."""
        return x.copy_(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 - autograd's
        """Save nothing for backward."""

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:  # noqa: ANN401 - autograd's
        """Pass the gradient to the result, which depends on x."""
        return d_out, None


def _in_place_of(x: Tensor, result: Tensor) -> Tensor:
    if not result.requires_grad:
        return x.copy_(result)
    held: Tensor = _Held.apply(result, x)  # type: ignore[no-untyped-call]
    return held


def _traced(
    x: Tensor,
    tables: Sequence[Rotary],
    positions: Positions,
    parts: tuple[Part, ...],
    *,
    inplace: bool,
) -> Tensor:
    """Rotate by custom operators, for `torch.compile` and fake tensors."""
    has_kernel = x.is_cuda and _has_kernel(x, [rotary.cos for rotary in tables])
    if has_kernel and inplace and not is_followed(x):
        for place, number in parts:
            for (own,) in by_heads(x[place] if place else x):
                torch.ops.jitattn.apply_rotary_(own, *_of_operator(tables[number], positions))
        return x
    result = _composed(x, tables, positions, parts, _operator if has_kernel else apply_rotary_cpu)
    if not inplace:
        return result
    with torch.no_grad():
        x.copy_(result)
    return result if result.requires_grad else x


def _operator(x: Tensor, rotary: Rotary, positions: Positions) -> Tensor:
    found: Tensor = torch.ops.jitattn.apply_rotary(x, *_of_operator(rotary, positions), False)
    return found


def _of_operator(rotary: Rotary, positions: Positions) -> tuple[Any, ...]:
    offset, offsets, cu_seqlens = positions
    return rotary.cos, rotary.sin, offsets, cu_seqlens, offset, rotary.interleaved

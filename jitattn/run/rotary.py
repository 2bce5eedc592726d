"""Rotary position embedding on a GPU: launches of the rotary kernel, and what autograd sees."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch

from jitattn.cpu.rotary import Positions
from jitattn.errors import UnsupportedError
from jitattn.jit import backend, launch
from jitattn.jit.device import device
from jitattn.jit.get_kernel import loaded_kernel
from jitattn.kernels.rotary import RotarySpec
from jitattn.run.autograd import FirstOrder
from jitattn.run.forward import check_cuda
from jitattn.spec.enums import Access, Switch
from jitattn.values.tensors import DTYPES, address_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

#: Place of a part of a tensor: what stands between [ and ].
Index: TypeAlias = tuple[slice | int, ...]
#: Heads of a row that a thread turns one after another, if that leaves so many threads for each SM.
_HEADS_PER_THREAD: Final = 4
_THREADS_PER_SM: Final = 4096


class Part(NamedTuple):
    """A part of a tensor that is turned, and the number of the tables that it is turned by."""

    place: Index
    table: int


class Rotation(NamedTuple):
    """A rotation of parts of a tensor, without its tensors."""

    parts: tuple[Part, ...]  #: each [B, L, H, D], [B, L, n, H, D] or, ragged, [total, H, D]
    kept: tuple[Index, ...]  #: all others
    offset: int
    interleaved: bool
    back: bool
    in_place: bool


class Rotate(FirstOrder):
    """A rotation as autograd sees it: linear, with derivatives of every order."""

    @staticmethod
    def forward(
        x: Tensor,
        offsets: Tensor | None,
        cu_seqlens: Tensor | None,
        rotation: Rotation,
        *tables: Tensor,
    ) -> Tensor:
        """Turn. In place, x itself is returned, and autograd takes that for a view of it."""
        return rotate_cuda(x, offsets, cu_seqlens, rotation, *tables)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 - autograd's
        """Keep what the gradient needs; that is not x."""
        del output
        _, offsets, cu_seqlens, rotation, *tables = inputs
        ctx.save_for_backward(offsets, cu_seqlens, *tables)
        ctx.rotation = rotation

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:  # noqa: ANN401 - autograd's
        """Turn the gradient back, out of place: others may hold it."""
        offsets, cu_seqlens, *tables = ctx.saved_tensors
        back = ctx.rotation._replace(back=not ctx.rotation.back, in_place=False)
        dx = rotate_followed(d_out, offsets, cu_seqlens, back, *tables)
        return (dx, None, None, None, *(None for _ in tables))


def rotate_followed(
    x: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    rotation: Rotation,
    *tables: Tensor,
) -> Tensor:
    """Turn under autograd."""
    result: Tensor = Rotate.apply(x, offsets, cu_seqlens, rotation, *tables)  # type: ignore[no-untyped-call]
    return result


def rotate_cuda(
    x: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    rotation: Rotation,
    *tables: Tensor,
) -> Tensor:
    """Turn parts of x, in place or into a new tensor: a launch for each; all arguments checked.

    Parameters
    ----------
    tables : Tensor
        cos, sin, and those of further parts.
    """
    check_cuda()
    out = x if rotation.in_place else torch.empty_like(x)
    if x.numel():
        positions = Positions(rotation.offset, offsets, cu_seqlens)
        index = x.get_device()
        if index == backend.active.current_device():
            _launch_parts(x, out, positions, rotation, tables, index)
        else:
            with backend.active.on_device(index):
                _launch_parts(x, out, positions, rotation, tables, index)
    if rotation.in_place:
        torch.autograd.graph.increment_version(x)
        return out
    for own in rotation.kept:
        out[own].copy_(x[own])
    return out


@functools.cache
def rotary_spec(
    dtype: torch.dtype, table_dtype: torch.dtype, interleaved: bool, access: Access, arch: str
) -> RotarySpec:
    """Return the kernel that turns."""
    return RotarySpec(
        dtype=DTYPES[dtype],
        table_dtype=DTYPES[table_dtype],
        interleaved=Switch.ON if interleaved else Switch.OFF,
        access=access,
        arch=arch,
    )


def by_heads(x: Tensor) -> Iterator[Tensor]:
    """Yield tensors [B, L, H, D] or [total, H, D] over the same memory; mostly one."""
    if x.dim() < 5:
        yield x
    elif x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3):
        yield x.flatten(2, 3)
    else:
        yield from x.unbind(2)


def _launch_parts(
    x: Tensor,
    out: Tensor,
    positions: Positions,
    rotation: Rotation,
    tables: tuple[Tensor, ...],
    index: int,
) -> None:
    for part in rotation.parts:
        cos, sin = tables[2 * part.table : 2 * part.table + 2]
        source, target = x, out
        if part.place:
            source, target = x[part.place], out[part.place]
        for one, other in zip(by_heads(source), by_heads(target), strict=True):
            _launch(one, other, cos, sin, positions, rotation, index)


def _launch(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Positions,
    rotation: Rotation,
    index: int,
) -> None:
    _, offsets, cu_seqlens = positions
    shape, (table_rows, half) = x.shape, cos.shape
    batch, length = (1, shape[0]) if cu_seqlens is not None else shape[:2]
    heads, head_dim = shape[-2:]
    x_strides, out_strides = _strides(x), _strides(out)
    table_strides = (cos.stride()[0], sin.stride()[0]) if table_rows > 1 else (0, 0)
    # ---- The kernel: 16 bytes at a time, if every access begins at a multiple of them
    units = half if rotation.in_place else half | head_dim
    units |= x_strides[0] | x_strides[1] | x_strides[2]
    units |= out_strides[0] | out_strides[1] | out_strides[2]
    address = address_of("x", x) | address_of("out", out) | units * x.element_size()
    address |= address_of("cos", cos) | address_of("sin", sin)
    address |= (table_strides[0] | table_strides[1]) * cos.element_size()
    is_wide = address & 15 == 0 and x_strides[3] == 1 == out_strides[3]
    access = Access.VEC16 if is_wide else Access.ELEMENT
    here = device(index)
    spec = rotary_spec(x.dtype, cos.dtype, rotation.interleaved, access, here.arch)
    # ---- Its threads
    unit = 16 // x.element_size() if is_wide else 1
    units_per_row = half // unit
    if not rotation.in_place:
        units_per_row += -(-(head_dim - 2 * half) // (2 * unit))
    per_head = batch * length * units_per_row
    groups = -(-heads // _HEADS_PER_THREAD)
    if per_head * groups < here.num_sms * _THREADS_PER_SM:
        groups = heads
    num_ctas = -(-per_head * groups // spec.num_threads)
    if num_ctas > launch.MAX_GRID:
        raise UnsupportedError(
            f"x has shape {list(x.shape)}, which takes {num_ctas} CTAs: a grid has at most "
            "2**31 - 1; split the batch"
        )
    if not num_ctas:
        return
    loaded_kernel(spec, index).launch(
        num_ctas,
        backend.active.stream(index),
        x=x.data_ptr(),
        out=out.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        offsets=0 if offsets is None else address_of("offset", offsets),
        cu_seqlens=0 if cu_seqlens is None else address_of("cu_seqlens", cu_seqlens),
        x_stride_batch=x_strides[0],
        x_stride_row=x_strides[1],
        x_stride_head=x_strides[2],
        x_stride_column=x_strides[3],
        out_stride_batch=out_strides[0],
        out_stride_row=out_strides[1],
        out_stride_head=out_strides[2],
        out_stride_column=out_strides[3],
        cos_stride=table_strides[0],
        sin_stride=table_strides[1],
        num_rows=batch * length,
        batch=batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        len=length,
        heads=heads,
        head_dim=head_dim,
        rotary_dim=2 * half,
        table_rows=table_rows,
        offset=rotation.offset,
        offset_word=1 if offsets is None else offsets.element_size() // 4,
        cu_word=1 if cu_seqlens is None else cu_seqlens.element_size() // 4,
        units_per_row=units_per_row,
        head_groups=groups,
        in_place=rotation.in_place,
        sign=-1.0 if rotation.back else 1.0,
    )


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Return those of batch, row, head and column; 0 where no index passes."""
    *outer, row, head, column = x.stride()
    *sizes, rows, heads, columns = x.shape
    return (
        outer[0] if outer and sizes[0] > 1 else 0,
        row if rows > 1 else 0,
        head if heads > 1 else 0,
        column if columns > 1 else 1,
    )

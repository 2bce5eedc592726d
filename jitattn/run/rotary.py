"""Rotary position embedding on a GPU: kernel launches and the autograd function."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch

from jitattn.cpu.rotary import Positions
from jitattn.jit.device import device
from jitattn.kernels.rotary import RotarySpec
from jitattn.plan.rotary import RotaryFacts, RowStrides, rotate
from jitattn.run.autograd import FirstOrder
from jitattn.run.execute import KeptPlans
from jitattn.run.forward import check_cuda
from jitattn.spec.enums import Access, Switch
from jitattn.values.tensors import DTYPES, address_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from jitattn.plan.step import Plan

#: Index of a part of a tensor, as in x[index].
Index: TypeAlias = tuple[slice | int, ...]
_plans: Final = KeptPlans()


class Part(NamedTuple):
    """A slice of a tensor to rotate, and the index of its cos and sin tables."""

    place: Index
    table: int


class Rotation(NamedTuple):
    """The parameters of a rotary embedding, without its tensors."""

    parts: tuple[Part, ...]  #: each [B, L, H, D], [B, L, n, H, D] or, ragged, [total, H, D]
    kept: tuple[Index, ...]  #: all others
    offset: int
    interleaved: bool
    back: bool
    in_place: bool


class Rotate(FirstOrder):
    """The autograd function of a rotary embedding: linear, with derivatives of every order."""

    @staticmethod
    def forward(
        x: Tensor,
        offsets: Tensor | None,
        cu_seqlens: Tensor | None,
        rotation: Rotation,
        *tables: Tensor,
    ) -> Tensor:
        """Rotate. In place, x itself is returned, which autograd treats as a view of it."""
        return rotate_cuda(x, offsets, cu_seqlens, rotation, *tables)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 - autograd's
        """Save the tables and offsets, which the gradient needs; not x."""
        del output
        _, offsets, cu_seqlens, rotation, *tables = inputs
        ctx.save_for_backward(offsets, cu_seqlens, *tables)
        ctx.rotation = rotation

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:  # noqa: ANN401 - autograd's
        """Rotate the gradient back, out of place: it may be shared."""
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
    """Apply a rotary embedding under autograd."""
    result: Tensor = Rotate.apply(x, offsets, cu_seqlens, rotation, *tables)  # type: ignore[no-untyped-call]
    return result


def rotate_cuda(
    x: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    rotation: Rotation,
    *tables: Tensor,
) -> Tensor:
    """Rotate parts of x in place or into a new tensor, one launch each; arguments are checked.

    Parameters
    ----------
    tables : Tensor
        cos, sin, and those of further parts.
    """
    check_cuda()
    out = x if rotation.in_place else torch.empty_like(x)
    if x.numel():
        positions = Positions(rotation.offset, offsets, cu_seqlens)
        _launch_parts(x, out, positions, rotation, tables, x.get_device())
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
    """Return the spec of the rotary kernel."""
    return RotarySpec(
        dtype=DTYPES[dtype],
        table_dtype=DTYPES[table_dtype],
        interleaved=Switch.ON if interleaved else Switch.OFF,
        access=access,
        arch=arch,
    )


def by_heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views [B, L, H, D] or [total, H, D] of tensors of one shape.

    Usually one view of each; several where a tensor has gaps between its groups of heads.
    """
    if tensors[0].dim() < 5:
        yield tensors
    elif all(x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3) for x in tensors):
        yield tuple(x.flatten(2, 3) for x in tensors)
    else:
        yield from zip(*(x.unbind(2) for x in tensors), strict=True)


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
        for one, other in by_heads(source, target):
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
    facts = RotaryFacts(
        x.shape,
        _strides(x),
        _strides(out),
        (cos.shape[0], cos.shape[1]),
        (cos.stride(0), sin.stride(0)) if cos.shape[0] > 1 else (0, 0),
        None if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        0 if offsets is None else offsets.element_size() // 4,
        0 if cu_seqlens is None else cu_seqlens.element_size() // 4,
        rotation.in_place,
        rotation.back,
    )
    addresses = {
        "x": address_of("x", x),
        "out": address_of("out", out),
        "cos": address_of("cos", cos),
        "sin": address_of("sin", sin),
    }
    together = addresses["x"] | addresses["out"] | addresses["cos"] | addresses["sin"]
    addresses["offset"] = rotation.offset
    if offsets is not None:
        addresses["offsets"] = address_of("offset", offsets)
    if cu_seqlens is not None:
        addresses["cu_seqlens"] = address_of("cu_seqlens", cu_seqlens)
    kind = (x.dtype, cos.dtype, rotation.interleaved, together & 15)

    def plan() -> Plan:
        here = device(index)
        access = _access(facts, together, x.element_size(), cos.element_size())
        spec = rotary_spec(x.dtype, cos.dtype, rotation.interleaved, access, here.arch)
        return rotate(spec, facts, here.num_sms)

    _plans.run((facts, *kind), plan, addresses, index)


def _access(facts: RotaryFacts, together: int, element: int, table_element: int) -> Access:
    """Return 16-byte access if every address and stride is aligned to it."""
    x, out, half = facts.x_strides, facts.out_strides, facts.table_shape[1]
    units = half if facts.in_place else half | facts.shape[-1]
    units |= x[0] | x[1] | x[2] | out[0] | out[1] | out[2]
    together |= units * element
    together |= (facts.table_strides[0] | facts.table_strides[1]) * table_element
    is_wide = together & 15 == 0 and x[3] == 1 == out[3]
    return Access.VEC16 if is_wide else Access.ELEMENT


def _strides(x: Tensor) -> RowStrides:
    """Return the (batch, row, head, column) strides; 0 for size-1 dimensions."""
    *outer, row, head, column = x.stride()
    *sizes, rows, heads, columns = x.shape
    return (
        outer[0] if outer and sizes[0] > 1 else 0,
        row if rows > 1 else 0,
        head if heads > 1 else 0,
        column if columns > 1 else 1,
    )

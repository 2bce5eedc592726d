"""q and k normalised on the GPU for cosine attention, and the gradients of that."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeAlias

import torch

from jitattn.jit import backend
from jitattn.jit.device import device
from jitattn.jit.get_kernel import loaded_kernel, on_gpu
from jitattn.request.norm import RowOrder
from jitattn.spec.enums import Access
from jitattn.spec.kernel_spec import NormGradSpec, NormSpec
from jitattn.values.tensors import DTYPES, readable

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call
    from jitattn.values.norm import L2Norm

#: Two inner sizes, and strides.
_Side: TypeAlias = tuple[int, int, tuple[int, int, int]]


def normalized(q: Tensor, k: Tensor, norm: L2Norm, call: Call) -> tuple[Tensor, Tensor]:
    """Return contiguous normalised copies of q and k, in their dtype: one launch."""
    q_out, k_out = like_normalized(q, k)
    head_dim, groups = q.shape[-1], norm.groups
    slices_q, slices_k = q.numel() // head_dim * groups, k.numel() // head_dim * groups
    if not slices_q + slices_k:
        return q_out, k_out
    rows = RowOrder.of(call)
    sides = _sides(q, k, rows)
    index = q.get_device()
    with on_gpu(index):
        spec = _norm_spec(q.dtype, head_dim, groups, _aligned(q, k, sides), device(index).arch)
        scale = None if norm.head_scale is None else norm.head_scale.contiguous()
        loaded_kernel(spec, index).launch(
            -(-(slices_q + slices_k) * spec.lanes // spec.num_threads),
            backend.active.stream(index),
            q.data_ptr(),
            k.data_ptr(),
            q_out.data_ptr(),
            k_out.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            *sides[0][2],
            *sides[1][2],
            slices_q,
            slices_k,
            sides[0][0],
            sides[1][0],
            sides[0][1],
            sides[1][1],
            rows.heads_first,
            not rows.heads_first,
        )
    return q_out, k_out


def normalized_grad(
    inputs: tuple[Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None],
    head_scale: Tensor | None,
    groups: int,
    rows: RowOrder,
    *,
    wants_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, of k and, if wanted, of head_scale: a launch for each tensor."""
    heads_first = rows.heads_first
    found: list[Tensor | None] = []
    d_scale = torch.zeros_like(head_scale) if head_scale is not None and wants_scale else None
    for x, d_y, side in zip(inputs, gradients, _sides(*inputs, rows), strict=True):
        is_q = not found
        if d_y is None:
            found.append(None)
            continue
        d_y = readable("the gradient of a normalised tensor", d_y).to(x.dtype).contiguous()
        dx = torch.empty_like(d_y)
        found.append(dx)
        num_slices = x.numel() // x.shape[-1] * groups
        if not num_slices:
            continue
        first, second, strides = side
        units = x.shape[-1] | strides[0] | strides[1] | strides[2]
        aligned = (x.data_ptr() | d_y.data_ptr() | units * x.element_size()) & 15 == 0
        index = x.get_device()
        along = None
        if is_q and d_scale is not None:
            along = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
        scale = head_scale.contiguous() if is_q and head_scale is not None else None
        with on_gpu(index):
            spec = NormGradSpec(
                dtype=DTYPES[x.dtype],
                head_dim=x.shape[-1],
                groups=groups,
                access=Access.VEC16 if aligned else Access.ELEMENT,
                arch=device(index).arch,
            )
            loaded_kernel(spec, index).launch(
                -(-num_slices * spec.lanes // spec.num_threads),
                backend.active.stream(index),
                x.data_ptr(),
                d_y.data_ptr(),
                dx.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                0 if along is None else along.data_ptr(),
                *strides,
                num_slices,
                first,
                second,
                heads_first,
                not heads_first,
            )
        if along is not None:
            head_axis = 1 if heads_first or x.dim() == 3 else 2
            d_scale = along.sum([axis for axis in range(along.dim()) if axis != head_axis])
    return found[0], found[1], d_scale


def like_normalized(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return new tensors for normalised q and k."""
    dense = torch.contiguous_format
    return torch.empty_like(q, memory_format=dense), torch.empty_like(k, memory_format=dense)


def norm_spec(q: Tensor, k: Tensor, norm: L2Norm, call: Call, arch: str) -> NormSpec:
    """Return the kernel that normalises q and k."""
    aligned = _aligned(q, k, _sides(q, k, RowOrder.of(call)))
    return _norm_spec(q.dtype, q.shape[-1], norm.groups, aligned, arch)


def _aligned(q: Tensor, k: Tensor, sides: tuple[_Side, _Side]) -> bool:
    (_, _, of_q), (_, _, of_k) = sides
    units = q.shape[-1] | of_q[0] | of_q[1] | of_q[2] | of_k[0] | of_k[1] | of_k[2]
    return (q.data_ptr() | k.data_ptr() | units * q.element_size()) & 15 == 0


@functools.cache
def _norm_spec(
    dtype: torch.dtype, head_dim: int, groups: int, aligned: bool, arch: str
) -> NormSpec:
    return NormSpec(
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        groups=groups,
        access=Access.VEC16 if aligned else Access.ELEMENT,
        arch=arch,
    )


def norm_grad_specs(spec: NormSpec) -> list[NormGradSpec]:
    """Return the kernels that the gradient of a normalisation can need."""
    return [
        NormGradSpec(
            dtype=spec.dtype,
            head_dim=spec.head_dim,
            groups=spec.groups,
            access=access,
            arch=spec.arch,
        )
        for access in dict.fromkeys((spec.access, Access.ELEMENT))
    ]


def _sides(q: Tensor, k: Tensor, rows: RowOrder) -> tuple[_Side, _Side]:
    return _side(q, rows.q_is_flat), _side(k, rows.k_is_flat)


def _side(tensor: Tensor, is_flat: bool) -> _Side:
    """Two inner sizes, of which the second is the faster, and strides (batch, first, second).

    Copies keep the order of their dimensions: "heads" of a [B, H, L, D] tensor are its rows.
    """
    if is_flat:
        return tensor.shape[0], tensor.shape[1], (0, tensor.stride(0), tensor.stride(1))
    return tensor.shape[1], tensor.shape[2], (tensor.stride(0), tensor.stride(1), tensor.stride(2))

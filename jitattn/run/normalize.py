"""q and k normalised on the GPU for cosine attention, and the gradients of that."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from jitattn.jit import backend
from jitattn.jit.device import device
from jitattn.jit.get_kernel import loaded_kernel, on_gpu
from jitattn.kernels.norm import NormGradSpec, NormSpec
from jitattn.request.norm import RowOrder
from jitattn.spec.enums import Access
from jitattn.values.tensors import DTYPES, readable

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call
    from jitattn.values.norm import L2Norm


class _Side(NamedTuple):
    """Sizes and strides of q or of k as the kernels see it."""

    rows: int
    heads: int  #: faster than rows: those of a [B, H, L, D] tensor are its rows
    strides: tuple[int, int, int]  #: of batch, rows and heads


def normalized(q: Tensor, k: Tensor, norm: L2Norm, call: Call) -> tuple[Tensor, Tensor]:
    """Return contiguous normalised copies of q and k, in their dtype: one launch."""
    q_out, k_out = like_normalized(q, k)
    head_dim, groups = q.shape[-1], norm.groups
    slices_q, slices_k = q.numel() // head_dim * groups, k.numel() // head_dim * groups
    if not slices_q + slices_k:
        return q_out, k_out
    rows = RowOrder.of(call)
    sides = of_q, of_k = _sides(q, k, rows)
    index = q.get_device()
    with on_gpu(index):
        spec = _norm_spec(q.dtype, head_dim, groups, _aligned(q, k, sides), device(index).arch)
        scale = None if norm.head_scale is None else norm.head_scale.contiguous()
        loaded_kernel(spec, index).launch(
            -(-(slices_q + slices_k) * spec.lanes // spec.num_threads),
            backend.active.stream(index),
            q=q.data_ptr(),
            k=k.data_ptr(),
            q_out=q_out.data_ptr(),
            k_out=k_out.data_ptr(),
            head_scale=0 if scale is None else scale.data_ptr(),
            q_stride_batch=of_q.strides[0],
            q_stride_row=of_q.strides[1],
            q_stride_head=of_q.strides[2],
            k_stride_batch=of_k.strides[0],
            k_stride_row=of_k.strides[1],
            k_stride_head=of_k.strides[2],
            num_slices_q=slices_q,
            num_slices_k=slices_k,
            len_q=of_q.rows,
            len_k=of_k.rows,
            heads_q=of_q.heads,
            heads_k=of_k.heads,
            scale_stride_row=rows.heads_first,
            scale_stride_head=not rows.heads_first,
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
        units = x.shape[-1] | side.strides[0] | side.strides[1] | side.strides[2]
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
                x=x.data_ptr(),
                d_y=d_y.data_ptr(),
                dx=dx.data_ptr(),
                head_scale=0 if scale is None else scale.data_ptr(),
                d_scale=0 if along is None else along.data_ptr(),
                x_stride_batch=side.strides[0],
                x_stride_row=side.strides[1],
                x_stride_head=side.strides[2],
                num_slices=num_slices,
                len=side.rows,
                heads=side.heads,
                scale_stride_row=heads_first,
                scale_stride_head=not heads_first,
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
    of_q, of_k = sides[0].strides, sides[1].strides
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
    """Return the inner sizes of a tensor: copies keep the order of its dimensions."""
    stride, shape = tensor.stride(), tensor.shape
    if is_flat:
        return _Side(shape[0], shape[1], (0, stride[0], stride[1]))
    return _Side(shape[1], shape[2], (stride[0], stride[1], stride[2]))

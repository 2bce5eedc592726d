"""Normalises q and k on the GPU for cosine attention, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from jitattn.jit.device import device
from jitattn.kernels.norm import NormGradSpec, NormSpec
from jitattn.plan.normalize import Side, normalize, normalize_gradient
from jitattn.request.norm import RowOrder
from jitattn.run.execute import KeptPlans
from jitattn.spec.enums import Access
from jitattn.values.tensors import DTYPES, readable

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.plan.step import Plan
    from jitattn.request.problem import Call
    from jitattn.values.norm import L2Norm


_plans: Final = KeptPlans()


def normalized(q: Tensor, k: Tensor, norm: L2Norm, call: Call) -> tuple[Tensor, Tensor]:
    """Return contiguous normalised copies of q and k, by one launch."""
    q_out, k_out = like_normalized(q, k)
    rows, groups = RowOrder.of(call), norm.groups
    scale = None if norm.head_scale is None else norm.head_scale.contiguous()
    at_q, at_k, index = q.data_ptr(), k.data_ptr(), q.get_device()
    addresses = {"q": at_q, "k": at_k, "q_out": q_out.data_ptr(), "k_out": k_out.data_ptr()}
    if scale is not None:
        addresses["head_scale"] = scale.data_ptr()
    facts = (
        q.dtype, q.shape, k.shape, q.stride(), k.stride(), (at_q | at_k) & 15 == 0, groups, rows,
        scale is None,
    )  # fmt: skip

    def plan() -> Plan:
        of_q, of_k = _sides(q, k, rows, groups)
        return normalize(
            norm_spec(q, k, norm, call, device(index).arch),
            of_q,
            of_k,
            heads_first=rows.heads_first,
            has_scale=scale is not None,
        )

    _plans.run(facts, plan, addresses, index)
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
    """Return the gradients of q, k and, on request, head_scale, by one launch for q and for k."""
    (q, k), (d_q, d_k) = inputs, gradients
    of_q, of_k = _sides(q, k, rows, groups)
    d_scale = torch.zeros_like(head_scale) if head_scale is not None and wants_scale else None
    along = None
    if d_scale is not None and d_q is not None and of_q.num_slices:
        along = q.new_empty((*q.shape[:-1], groups), dtype=torch.float32)
    scale = None if head_scale is None else head_scale.contiguous()
    dq = None if d_q is None else _gradient(q, d_q, of_q, groups, rows, scale, along)
    dk = None if d_k is None else _gradient(k, d_k, of_k, groups, rows, None, None)
    if along is not None:
        head_axis = 1 if rows.heads_first or q.dim() == 3 else 2
        d_scale = along.sum([axis for axis in range(along.dim()) if axis != head_axis])
    return dq, dk, d_scale


def _gradient(
    x: Tensor,
    d_y: Tensor,
    side: Side,
    groups: int,
    rows: RowOrder,
    scale: Tensor | None,
    along: Tensor | None,
) -> Tensor:
    """Return the gradient of q or k; `along` receives the row terms of the gradient of `scale`."""
    d_y = readable("the gradient of a normalised tensor", d_y).to(x.dtype).contiguous()
    dx = torch.empty_like(d_y)
    if not side.num_slices:
        return dx
    units = x.shape[-1] | side.strides[0] | side.strides[1] | side.strides[2]
    aligned = (x.data_ptr() | d_y.data_ptr() | units * x.element_size()) & 15 == 0
    addresses = {"x": x.data_ptr(), "d_y": d_y.data_ptr(), "dx": dx.data_ptr()}
    if scale is not None:
        addresses["head_scale"] = scale.data_ptr()
    if along is not None:
        addresses["d_scale"] = along.data_ptr()
    index = x.get_device()
    optional = {"has_scale": scale is not None, "has_d_scale": along is not None}
    facts = ("gradient", x.dtype, x.shape[-1], side, groups, aligned, rows, *optional.values())

    def plan() -> Plan:
        spec = NormGradSpec(
            dtype=DTYPES[x.dtype],
            head_dim=x.shape[-1],
            groups=groups,
            access=Access.VEC16 if aligned else Access.ELEMENT,
            arch=device(index).arch,
        )
        return normalize_gradient(spec, side, heads_first=rows.heads_first, **optional)

    _plans.run(facts, plan, addresses, index)
    return dx


def like_normalized(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate tensors for normalised q and k."""
    dense = torch.contiguous_format
    return torch.empty_like(q, memory_format=dense), torch.empty_like(k, memory_format=dense)


def norm_spec(q: Tensor, k: Tensor, norm: L2Norm, call: Call, arch: str) -> NormSpec:
    """Return the spec of the kernel that normalises q and k."""
    of_q, of_k = (side.strides for side in _sides(q, k, RowOrder.of(call), norm.groups))
    units = q.shape[-1] | of_q[0] | of_q[1] | of_q[2] | of_k[0] | of_k[1] | of_k[2]
    aligned = (q.data_ptr() | k.data_ptr() | units * q.element_size()) & 15 == 0
    return NormSpec(
        dtype=DTYPES[q.dtype],
        head_dim=q.shape[-1],
        groups=norm.groups,
        access=Access.VEC16 if aligned else Access.ELEMENT,
        arch=arch,
    )


def norm_grad_specs(spec: NormSpec) -> list[NormGradSpec]:
    """Return the kernels that the gradient of a normalisation may need."""
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


def _sides(q: Tensor, k: Tensor, rows: RowOrder, groups: int) -> tuple[Side, Side]:
    return _side(q, rows.q_is_flat, groups), _side(k, rows.k_is_flat, groups)


def _side(tensor: Tensor, is_flat: bool, groups: int) -> Side:
    """Return the sizes and strides of a tensor; copies keep the order of its dimensions."""
    stride, shape = tensor.stride(), tensor.shape
    num_slices = tensor.numel() // shape[-1] * groups
    if is_flat:
        return Side(shape[0], shape[1], (0, stride[0], stride[1]), num_slices)
    return Side(shape[1], shape[2], (stride[0], stride[1], stride[2]), num_slices)

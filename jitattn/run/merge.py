"""Merges results over disjoint sets of keys on a GPU, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.errors import UnsupportedError
from jitattn.jit.device import device
from jitattn.kernels.combine import CombineGradSpec, CombineSpec
from jitattn.plan.merge import MergeSizes, PartStrides, merge, merge_gradient
from jitattn.run.autograd import FirstOrder, apply, first_order
from jitattn.run.execute import KeptPlans
from jitattn.values.tensors import DTYPES, MAX_HEAD_DIM, readable

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.plan.step import Plan

_plans: Final = KeptPlans()


def merge_on_gpu(parts: Tensor, lses: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge parts [S, B, Lq, Hq, Dv] with LSEs [S, B, Hq, Lq] to out [B, Hq, Lq, Dv] and LSE."""
    if torch.is_grad_enabled() and (parts.requires_grad or lses.requires_grad):
        out, lse = apply(Merge, parts, lses, out_dtype)
        return out, lse
    return _merge(parts, lses, out_dtype)


class Merge(FirstOrder):
    """The autograd function of a merge: parts and their LSEs in, out and LSE out."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        parts: Tensor,
        lses: Tensor,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Merge the parts."""
        out, lse = _merge(parts, lses, out_dtype)
        ctx.save_for_backward(parts, lses, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:  # noqa: ANN401
        """Compute the gradients of parts and LSEs."""
        parts, lses, out, lse = ctx.saved_tensors
        if d_out is None:
            if d_lse is None:
                return None, None, None
            d_out = torch.zeros_like(out)
        return (*_merge_gradient(parts, lses, out, lse, d_out, d_lse), None)


def _merge(parts: Tensor, lses: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num_parts, batch, len_q, heads, dim = parts.shape
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise UnsupportedError(f"outs has head_dim {dim}: it must be from 1 to {MAX_HEAD_DIM}")
    parts = _in_lines(parts)
    out = torch.empty(batch, heads, len_q, dim, dtype=out_dtype, device=parts.device)
    lse = torch.empty(batch, heads, len_q, dtype=torch.float32, device=parts.device)
    index = parts.get_device()

    def plan() -> Plan:
        spec = CombineSpec(
            dtype=DTYPES[parts.dtype],
            out_dtype=DTYPES[out_dtype],
            head_dim_v=dim,
            arch=device(index).arch,
        )
        of_part, of_batch, of_head, of_row = lses.stride()
        sizes, of_lses = MergeSizes(num_parts, batch, len_q, heads), (of_batch, of_row, of_head)
        return merge(spec, sizes, _part_strides(parts), (of_part, *of_lses))

    addresses = {
        "parts": parts.data_ptr(),
        "part_lses": lses.data_ptr(),
        "out": out.data_ptr(),
        "lse": lse.data_ptr(),
    }
    facts = (parts.dtype, out_dtype, parts.shape, parts.stride(), lses.stride())
    _plans.run(facts, plan, addresses, index)
    return out, lse


def _merge_gradient(
    parts: Tensor, lses: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of parts and LSEs, in their shapes."""
    num_parts, batch, len_q, heads, dim = parts.shape
    parts = _in_lines(parts)
    d_out = readable("the gradient of out", d_out)
    d_lse = None if d_lse is None else readable("the gradient of the LSE", d_lse).contiguous()
    lses, d_out = lses.contiguous(), d_out.to(out.dtype).contiguous()
    d_parts = parts.new_empty(num_parts, batch, heads, len_q, dim)
    d_lses = torch.empty_like(lses)
    index = parts.get_device()

    def plan() -> Plan:
        spec = CombineGradSpec(
            dtype=DTYPES[parts.dtype],
            out_dtype=DTYPES[out.dtype],
            head_dim_v=dim,
            arch=device(index).arch,
        )
        sizes = MergeSizes(num_parts, batch, len_q, heads)
        return merge_gradient(spec, sizes, _part_strides(parts), has_d_lse=d_lse is not None)

    addresses = {
        "parts": parts.data_ptr(),
        "part_lses": lses.data_ptr(),
        "out": out.data_ptr(),
        "lse": lse.data_ptr(),
        "d_out": d_out.data_ptr(),
        "d_parts": d_parts.data_ptr(),
        "d_part_lses": d_lses.data_ptr(),
    }
    if d_lse is not None:
        addresses["d_lse"] = d_lse.data_ptr()
    facts = ("gradient", parts.dtype, out.dtype, parts.shape, parts.stride(), d_lse is None)
    _plans.run(facts, plan, addresses, index)
    return d_parts.transpose(2, 3), d_lses


def _in_lines(parts: Tensor) -> Tensor:
    """Return parts with contiguous rows, copied if necessary."""
    return parts.contiguous() if parts.stride(4) != 1 and parts.shape[4] > 1 else parts


def _part_strides(parts: Tensor) -> PartStrides:
    part, batch, row, head, _ = parts.stride()
    return part, batch, row, head

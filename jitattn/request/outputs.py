"""Validates the output tensor that a caller passes as `out`."""

from __future__ import annotations

import torch
from torch import Tensor

from jitattn.errors import InvalidInputError
from jitattn.values.tensors import address_of, short


def check_out(
    out: Tensor, inputs: tuple[Tensor, Tensor, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Check dtype, shape and memory of `out`; strides are checked where they are read."""
    if not isinstance(out, torch.Tensor):
        raise InvalidInputError(f"out is a {type(out).__name__}: it must be a torch tensor")
    if out.shape != shape:
        raise InvalidInputError(
            f"out has shape {list(out.shape)}: it must be {list(shape)}, like q with the head_dim "
            "of v; allocate it with torch.empty, or leave it out"
        )
    if out.dtype != dtype:
        raise InvalidInputError(
            f"out is {short(out.dtype)} but the result is {short(dtype)}: they must be the same; "
            "pass the dtype of out as out_dtype"
        )
    if out.device != inputs[0].device:
        raise InvalidInputError(
            f"out is on {out.device} but q is on {inputs[0].device}: they must be on one device"
        )
    q, k, v = inputs
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or out.requires_grad
    ):
        raise InvalidInputError(
            "out is given and a tensor requires grad: a result that autograd follows must be a "
            "new tensor; leave out out, or call under torch.no_grad()"
        )
    _check_out_memory(out, q, k, v)


def _check_out_memory(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse an `out` that overlaps itself or, where that is simple to tell, an input."""
    count = out.numel()
    if not count:
        return
    reached = 1  # extent of the dimensions so far, smallest strides first
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride < reached:
                raise InvalidInputError(
                    f"out has strides {tuple(out.stride())} for shape {list(out.shape)}: its "
                    "elements must not overlap; allocate it with torch.empty"
                )
            reached += stride * (size - 1)
    start, span = address_of("out", out), _span(out)
    end = start + span * out.element_size()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        other, other_span = address_of(name, tensor), _span(tensor)
        other_end = other + other_span * tensor.element_size()
        # Overlapping address ranges surely share memory if they begin together or if one of them
        # has no gaps; interleaved ones are the caller's responsibility.
        if (
            start < other_end
            and other < end
            and tensor.numel()
            and min(start, other) > 0  # both have an address
            and (start == other or span == count or other_span <= tensor.numel())
        ):
            raise InvalidInputError(
                f"out lies in the memory of {name}: the result may not overwrite the inputs; "
                "pass a tensor of its own, or leave out out"
            )


def _span(tensor: Tensor) -> int:
    """Return the extent of a non-empty tensor in memory, in elements."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )

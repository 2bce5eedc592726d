"""`merge`: combines results over disjoint sets of keys by their LSE."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jitattn.cpu.mkl_warmup import mkl_warmup
from jitattn.errors import InternalError, InvalidInputError, UnsupportedError
from jitattn.request.problem import axes
from jitattn.run.forward import has_duals
from jitattn.run.indirect import in_transform, is_watched
from jitattn.run.merge import merge_on_gpu
from jitattn.values.autocast import outside_autocast
from jitattn.values.tensors import CPU_DTYPES, DTYPES, address_of

if TYPE_CHECKING:
    from collections.abc import Sequence


def merge(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    layout: str = "bshd",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge results of attention of the same queries over disjoint sets of keys.

    For prefix caches, keys that are distributed over devices, and chunks computed elsewhere. Exact:
    softmax over all keys is the mean of the parts, weighted by exp(LSE). Parts are summed in order,
    in fp32, so the result is bitwise reproducible.

    Parameters
    ----------
    outs : sequence of Tensor [B, Lq, Hq, Dv], or one Tensor [S, B, Lq, Hq, Dv]
        fp16, bf16 or fp32, on one device. With ``layout="bhsd"``, [B, Hq, Lq, Dv]; without a batch,
        [total, Hq, Dv], as a ragged q gives it. A sequence is stacked first, which copies it.
    lses : sequence of Tensor [B, Hq, Lq], or one Tensor [S, B, Hq, Lq]; fp32
        Natural logarithms; without a batch, [Hq, total]. Where one is -inf, the part has no visible
        key, and its values are ignored.
    layout : "bshd" or "bhsd"
        Of tensors with a batch.
    out_dtype : torch.dtype, default that of outs

    Returns
    -------
    out : Tensor, as one of outs
        0 where no part has a visible key.
    lse : Tensor, as one of lses
        -inf there.

    Raises
    ------
    InvalidInputError
        Shapes, dtypes or devices do not fit together.
    UnsupportedError
        A dtype or head dim that no kernel exists for.

    Examples
    --------
    >>> import torch, jitattn
    >>> q, k, v = torch.randn(1, 4, 2, 16), *torch.randn(2, 1, 64, 2, 16)
    >>> halves = [
    ...     jitattn.attention(q, k[:, part], v[:, part], return_lse=True)
    ...     for part in (slice(0, 40), slice(40, 64))
    ... ]
    >>> out, lse = jitattn.merge(*zip(*halves))
    >>> torch.allclose(out, jitattn.attention(q, k, v), atol=1e-5)
    True
    """
    axes(layout)
    outs = outs if isinstance(outs, Tensor) else list(outs)
    lses = lses if isinstance(lses, Tensor) else list(lses)
    by_kernel = _has_kernel(outs, lses)
    parts, part_lses = _stacked("outs", outs), _stacked("lses", lses)
    dtype = parts.dtype if out_dtype is None else out_dtype
    _check(parts, part_lses, layout, dtype)
    merged = merge_on_gpu if by_kernel else merge_plain
    if parts.dim() == 4:  # flat: one sequence of all rows, heads second
        flat_out, flat_lse = merged(parts[:, None], part_lses[:, None], dtype)
        return flat_out[0].transpose(0, 1), flat_lse[0]
    out, lse = merged(parts if layout == "bshd" else parts.transpose(2, 3), part_lses, dtype)
    return (out if layout == "bhsd" else out.transpose(1, 2)), lse


def _has_kernel(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> bool:
    """Return whether a kernel can read all tensors, and no transform or trace must see it.

    Raises
    ------
    InvalidInputError
        The memory of a tensor was freed.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    named = [
        (f"{name}[{idx}]", one)
        for name, given in (("outs", outs), ("lses", lses))
        for idx, one in enumerate([given] if isinstance(given, Tensor) else given)
        if isinstance(one, Tensor)
    ]
    addresses = [address_of(name, one) for name, one in named]
    if not all(one.is_cuda for _, one in named) or is_watched() or in_transform():
        return False
    return min(addresses, default=0) >= 0 and not has_duals(one for _, one in named)


def _stacked(name: str, tensors: Sequence[Tensor] | Tensor) -> Tensor:
    if isinstance(tensors, Tensor):
        return tensors
    parts = list(tensors)
    for idx, part in enumerate(parts):
        if not isinstance(part, Tensor):
            raise InvalidInputError(
                f"{name}[{idx}] is a {type(part).__name__}: it must be a torch tensor"
            )
        first = parts[0]
        if (part.shape, part.dtype, part.device) != (first.shape, first.dtype, first.device):
            raise InvalidInputError(
                f"{name}[{idx}] is {part.dtype} {list(part.shape)} on {part.device}, {name}[0] "
                f"{first.dtype} {list(first.shape)} on {first.device}: they must be alike"
            )
    if not parts:
        raise InvalidInputError(f"{name} is empty: there must be at least one part")
    return torch.stack(parts)


def _check(parts: Tensor, lses: Tensor, layout: str, out_dtype: torch.dtype) -> None:
    shape = list(parts.shape)
    if parts.dim() == 5:
        row, head = axes(layout)
        expected = [shape[0], shape[1], shape[head + 1], shape[row + 1]]
    elif parts.dim() == 4:
        expected = [shape[0], shape[2], shape[1]]
    else:
        raise InvalidInputError(
            f"outs has shape {shape[1:]} a part: it must be [B, Lq, Hq, Dv] or [total, Hq, Dv]"
        )
    if list(lses.shape) != expected or lses.device != parts.device:
        raise InvalidInputError(
            f"lses has shape {list(lses.shape[1:])} a part on {lses.device}: with outs "
            f"{shape[1:]} on {parts.device} it must be {expected[1:]} there ({shape[0]} parts)"
        )
    wide = torch.promote_types(parts.dtype, torch.float32)
    if lses.dtype not in (torch.float32, wide):
        raise InvalidInputError(f"lses is {lses.dtype}: an LSE of {parts.dtype} is {wide}")
    if shape[0] == 0:
        raise InvalidInputError("outs is empty: there must be at least one part")
    allowed = DTYPES if parts.is_cuda else CPU_DTYPES
    if parts.dtype not in allowed or out_dtype not in allowed:
        raise UnsupportedError(
            f"outs is {parts.dtype} and out_dtype {out_dtype}: merge takes "
            f"{', '.join(map(str, allowed))} there; cast with .to()"
        )


@outside_autocast
def merge_plain(parts: Tensor, lses: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge as `merge_on_gpu`, in plain torch operations that support every transform."""
    if not torch.compiler.is_dynamo_compiling():
        mkl_warmup()
    wide = torch.promote_types(parts.dtype, torch.float32)
    lses = lses.to(wide)
    highest = lses.detach().amax(dim=0)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    total, out = torch.zeros_like(highest), None
    for part, lse in zip(parts, lses, strict=True):
        weight = torch.exp(lse - highest)
        # Rows of a part without a visible key are ignored, even NaN.
        values = part.transpose(1, 2).to(wide).masked_fill((lse == -math.inf)[..., None], 0.0)
        total = total + weight
        weighted = weight[..., None] * values
        out = weighted if out is None else out + weighted
    if out is None:
        raise InternalError("there are no parts to merge")
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    lse = (highest + total.log()).masked_fill(blind, -math.inf)
    return (out / total[..., None]).to(out_dtype).contiguous(), lse

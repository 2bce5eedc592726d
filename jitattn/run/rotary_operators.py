"""Registers rotary position embedding as torch.library operators, for `torch.compile`.

``jitattn::apply_rotary`` returns a new tensor and is differentiable in x; the in-place operator is
``jitattn::apply_rotary_``. Both take one tensor [B, L, H, D] or, with cumulative lengths,
[total, H, D].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.cpu.rotary import Positions, apply_rotary_cpu
from jitattn.run.rotary import Part, Rotation, rotate_cuda
from jitattn.values.rotary import Rotary

if TYPE_CHECKING:
    from torch import Tensor

#: The whole tensor, rotated by the first tables.
WHOLE: Final = (Part((), 0),)


def _apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    offset: int,
    interleaved: bool,
    back: bool,
) -> Tensor:
    with torch.no_grad():
        if x.is_cuda:
            rotation = Rotation(WHOLE, (), offset, interleaved, back, in_place=False)
            return rotate_cuda(x, offsets, cu_seqlens, rotation, cos, sin)
        rotary = Rotary(cos, -sin if back else sin, interleaved=interleaved)
        return apply_rotary_cpu(x, rotary, Positions(offset, offsets, cu_seqlens))


def _apply_rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    offset: int,
    interleaved: bool,
) -> None:
    with torch.no_grad():
        if x.is_cuda:
            rotation = Rotation(WHOLE, (), offset, interleaved, back=False, in_place=True)
            rotate_cuda(x, offsets, cu_seqlens, rotation, cos, sin)
            return
        rotary = Rotary(cos, sin, interleaved=interleaved)
        x.copy_(apply_rotary_cpu(x, rotary, Positions(offset, offsets, cu_seqlens)))


def _apply_rotary_fake(x: Tensor, *given: Any) -> Tensor:  # noqa: ANN401
    del given
    return torch.empty_like(x)


def _apply_rotary__fake(x: Tensor, *given: Any) -> None:  # noqa: ANN401
    del x, given


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 - autograd's
    del output
    _, cos, sin, offsets, cu_seqlens, *ctx.others = inputs
    ctx.save_for_backward(cos, sin, offsets, cu_seqlens)


def _backward(ctx: Any, d_out: Tensor) -> Any:  # noqa: ANN401 - autograd's
    offset, interleaved, back = ctx.others
    dx = torch.ops.jitattn.apply_rotary(d_out, *ctx.saved_tensors, offset, interleaved, not back)
    return (dx, *(None,) * 7)


_library: Any = torch.library.Library("jitattn", "FRAGMENT")
_TABLES: Final = "Tensor cos, Tensor sin, Tensor? offsets, Tensor? cu_seqlens, int offset"
_library.define(f"apply_rotary(Tensor x, {_TABLES}, bool interleaved, bool back) -> Tensor")
_library.define(f"apply_rotary_(Tensor(a!) x, {_TABLES}, bool interleaved) -> ()")
_library.impl("apply_rotary", _apply_rotary, "CompositeExplicitAutograd")
_library.impl("apply_rotary_", _apply_rotary_, "CompositeExplicitAutograd")
torch.library.register_fake("jitattn::apply_rotary", _apply_rotary_fake, lib=_library)
torch.library.register_fake("jitattn::apply_rotary_", _apply_rotary__fake, lib=_library)
torch.library.register_autograd(
    "jitattn::apply_rotary", _backward, setup_context=_setup_context, lib=_library
)

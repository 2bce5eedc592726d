"""Detects writes to a tensor since it was read.

torch counts in-place writes in a version counter, except for inference tensors (created under
`torch.inference_mode`): a copy of those is kept, and contents are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: Torch's own message, which programs match.
_WRITTEN: Final = (
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation: {what} is at version {now}; expected version {then} instead. Write to a copy, or "
    "call backward first"
)


class Snapshot:
    """Version or contents of a tensor at one time."""

    __slots__ = ("_copy", "_version")

    def __init__(self, tensor: Tensor) -> None:
        is_tracked = not tensor.is_inference()
        self._version = tensor._version if is_tracked else 0
        self._copy = None if is_tracked else tensor.clone()

    def still_holds(self, tensor: Tensor) -> bool:
        """Return whether the tensor was not written to since.

        Inference tensors on a GPU are compared by a kernel, which the host waits for; not while a
        CUDA graph is captured, when nothing can be waited for: they count as unchanged then.
        """
        if self._copy is None:
            return not tensor.is_inference() and tensor._version == self._version
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        return torch.equal(tensor, self._copy)


def guard(results: Tensor | tuple[Tensor, Tensor], inputs: Sequence[tuple[str, Tensor]]) -> None:
    """Make backward raise if an input was written to after the forward pass.

    For named inputs that backward reads again without `save_for_backward`.
    """
    tracked = [(name, x, x._version) for name, x in inputs if not x.is_inference()]

    def check(_: object) -> None:
        for name, tensor, version in tracked:
            if tensor._version != version:
                raise RuntimeError(_WRITTEN.format(what=name, now=tensor._version, then=version))

    for result in (results,) if isinstance(results, torch.Tensor) else results:
        if result.grad_fn is not None:
            result.grad_fn.register_prehook(check)


def mark_as_written(tensor: Tensor) -> None:
    """Count a write that torch cannot see, such as a kernel of another library over DLPack.

    Inference tensors do not need it: their contents are compared.
    """
    torch.autograd.graph.increment_version(tensor)

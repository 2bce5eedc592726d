"""Copies small tensors from the host to a GPU without synchronizing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor


def on_device(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, copied without synchronizing.

    From the host to a GPU it goes through pinned memory: a plain copy would wait until all that was
    launched before has run.

    Raises
    ------
    InvalidInputError
        A CUDA graph is captured: its replays would read the host's memory anew.
    """
    if tensor.device == device:
        return tensor
    if device.type != "cuda" or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return tensor.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise InvalidInputError(
            f"{name} is on the CPU while a CUDA graph is captured: replays would read it anew, "
            f"wherever it is by then; move it to {device} before the capture"
        )
    return tensor.pin_memory().to(device, non_blocking=True)

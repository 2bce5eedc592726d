"""Detects operations that make the host wait for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: Operations that read values of a tensor on the host.
_WAITS = {
    getattr(torch.Tensor, name)
    for name in (
        "item", "tolist", "numpy", "cpu", "nonzero", "equal", "unique", "masked_select",
        "__bool__", "__int__", "__float__", "__index__", "__contains__",
    )
} | {torch.equal, torch.nonzero, torch.unique, torch.masked_select, torch.allclose}  # fmt: skip


class NoWaiting(TorchFunctionMode):
    """Refuses operations that would wait for a GPU, as if every tensor were on one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _WAITS:
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))

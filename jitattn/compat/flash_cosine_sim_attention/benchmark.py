"""The original's timer for functions of tensors."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def benchmark(
    fn: Callable[..., torch.Tensor],
    *,
    num_times: int = 10,
    warmup_iters: int = 10,
    forwards: bool = True,
    backwards: bool = False,
) -> Callable[..., float]:
    """Return a function that takes the arguments of `fn` and returns its mean time in ms.

    Parameters
    ----------
    fn : callable
        Returns a tensor; with `backwards`, one that requires grad.
    num_times, warmup_iters : int
        Calls that are timed, and calls before them.
    forwards, backwards : bool
        What is timed: the call, the backward pass from its sum, or both.
    """

    def timed(*args: Any, **kwargs: Any) -> float:  # noqa: ANN401 - those of fn
        uses_gpu = torch.cuda.is_available()

        def now() -> float:
            if uses_gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

        total = 0.0
        for call in range(warmup_iters + num_times):
            start = now()
            out = fn(*args, **kwargs)
            middle = now()
            loss = out.sum() if backwards else None
            before = now()
            if loss is not None:
                loss.backward()
            end = now()
            if call >= warmup_iters:
                total += (middle - start) * forwards + (end - before) * backwards
        return total * 1e3 / max(1, num_times)

    return timed

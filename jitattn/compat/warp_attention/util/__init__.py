"""Helpers of the original's scripts: timing, operation counts, errors."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


def cuda_synchronize(
    device: torch.device | str | int | None = None, stream: torch.cuda.Stream | None = None
) -> None:
    """Synchronize a stream or a device; does nothing without a GPU."""
    if not torch.cuda.is_available():
        return
    if stream is not None:
        stream.synchronize()
    else:
        torch.cuda.synchronize(device)


def cuda_timeit(
    func: Callable[..., Any],
    args: Mapping[str, Any] | None = None,
    loops: int = 1,
    stream: torch.cuda.Stream | None = None,
    verbose: int = 1,
    warmup_loops: int = 1,
    setup: Callable[[], Any] | None = None,
) -> tuple[Any, float]:
    """Time ``func(**args)`` by the host's clock, synchronizing around every loop.

    Returns
    -------
    result : object
        Of the last loop.
    seconds : float
        The mean of `loops`, after `warmup_loops` that do not count.
    """
    given = dict(args or {})
    result, total = None, 0.0
    context = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
    with context:
        for loop in range(-warmup_loops, loops):
            if setup is not None:
                setup()
            cuda_synchronize(stream=stream)
            start = time.perf_counter()
            result = func(**given)
            cuda_synchronize(stream=stream)
            if loop >= 0:
                total += time.perf_counter() - start
    mean = total / max(1, loops)
    if verbose:
        print(f"{getattr(func, '__name__', 'func')}: {mean * 1e6:.1f} us")  # noqa: T201
    return result, mean


def bmm_flop(b: int, m: int, n: int, k: int, fma: bool = True) -> int:
    """Count the operations of b products [m, k] x [k, n]; one for a multiplication and addition.

    Without `fma`, two.
    """
    return b * m * n * k * (1 if fma else 2)


def attn_flop(
    b: int, m: int, n: int, k: int, h: int, is_causal: bool = False, fma: bool = True
) -> int:
    """Count the operations of attention of m queries on n keys, head_dim k; causal without half of
    the last m keys.
    """  # noqa: D205
    count = 2 * bmm_flop(b * h, m, n, k, fma)
    return count - (bmm_flop(b * h, m, m, k, fma) if is_causal else 0)


def mse(x: Tensor, y: Tensor) -> float:
    """Return the mean squared difference, in fp32."""
    return (x.float() - y.float()).square().mean().item()


def mae(x: Tensor, y: Tensor) -> float:
    """Return the mean absolute difference, in fp32."""
    return (x.float() - y.float()).abs().mean().item()


def get_absolute_path(path: str) -> str:
    """Return a path as an absolute one."""
    return str(Path(path).resolve())


def __getattr__(name: str) -> Any:  # noqa: ANN401 - of a module
    if name == "tune":  # imported last: it needs the names above
        from jitattn.compat.warp_attention.warpat_tester import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

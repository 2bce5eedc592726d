"""`flash_attn.utils.benchmark`: times a function and its backward pass with torch's timer.

Each timer takes a function and its arguments, and returns a pair of `torch.utils.benchmark.Timer`
and `Measurement` (seconds: `.mean`); `desc` names what is printed with `verbose`; `amp` runs it
under autocast to `amp_dtype`. `grad` is the gradient of the result, drawn if left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import benchmark

from jitattn.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Timed = tuple[benchmark.Timer, benchmark.utils.common.Measurement]

__all__ = [
    "benchmark_all",
    "benchmark_backward",
    "benchmark_combined",
    "benchmark_forward",
    "benchmark_fwd_bwd",
    "benchmark_memory",
    "pytorch_profiler",
]


def benchmark_forward(
    fn: Callable[..., Any],
    *inputs: Any,  # noqa: ANN401 - of fn
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,  # noqa: ANN401
) -> Timed:
    """Time a call."""

    def run() -> None:
        with torch.autocast(_device_of(inputs), amp_dtype, enabled=amp):
            fn(*inputs, **kwinputs)

    return _timed(run, repeats, f"{desc} - Forward pass", verbose)


def benchmark_backward(
    fn: Callable[..., Any],
    *inputs: Any,  # noqa: ANN401
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,  # noqa: ANN401
) -> Timed:
    """Time the backward pass of a single forward call."""
    with torch.autocast(_device_of(inputs), amp_dtype, enabled=amp):
        result = _first(fn(*inputs, **kwinputs))
    d_result = _gradient(result, grad)

    def run() -> None:
        _forget_gradients(inputs)
        result.backward(d_result, retain_graph=True)

    return _timed(run, repeats, f"{desc} - Backward pass", verbose)


def benchmark_combined(
    fn: Callable[..., Any],
    *inputs: Any,  # noqa: ANN401
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,  # noqa: ANN401
) -> Timed:
    """Time a call and its backward pass together."""
    with torch.autocast(_device_of(inputs), amp_dtype, enabled=amp):
        d_result = _gradient(_first(fn(*inputs, **kwinputs)), grad)

    def run() -> None:
        _forget_gradients(inputs)
        with torch.autocast(_device_of(inputs), amp_dtype, enabled=amp):
            result = _first(fn(*inputs, **kwinputs))
        result.backward(d_result)

    return _timed(run, repeats, f"{desc} - Forward + Backward pass", verbose)


def benchmark_fwd_bwd(
    fn: Callable[..., Any],
    *inputs: Any,  # noqa: ANN401
    grad: Tensor | None = None,
    **kwinputs: Any,  # noqa: ANN401
) -> tuple[Timed, Timed]:
    """Time a call, and its backward pass."""
    forward = benchmark_forward(fn, *inputs, **kwinputs)
    return forward, benchmark_backward(fn, *inputs, grad=grad, **kwinputs)


def benchmark_all(
    fn: Callable[..., Any],
    *inputs: Any,  # noqa: ANN401
    grad: Tensor | None = None,
    **kwinputs: Any,  # noqa: ANN401
) -> tuple[Timed, Timed, Timed]:
    """Time a call, its backward pass, and both together."""
    apart = benchmark_fwd_bwd(fn, *inputs, grad=grad, **kwinputs)
    return *apart, benchmark_combined(fn, *inputs, grad=grad, **kwinputs)


def benchmark_memory(
    fn: Callable[..., Any],
    *inputs: Any,  # noqa: ANN401
    desc: str = "",
    verbose: bool = True,
    **kwinputs: Any,  # noqa: ANN401
) -> float:
    """Return PyTorch's peak GPU memory during a call, in units of 10^9 bytes.

    Raises
    ------
    UnsupportedError
        There is no GPU.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("benchmark_memory measures a GPU's memory, and torch sees no GPU")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    fn(*inputs, **kwinputs)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() / 1e9
    if verbose:
        print(f"{desc} max memory: {most} GB")  # noqa: T201 - what it is for
    torch.cuda.empty_cache()
    return most


def pytorch_profiler(
    fn: Callable[..., Any],
    *inputs: Any,  # noqa: ANN401
    trace_filename: str | None = None,
    backward: bool = False,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    cpu: bool = False,
    verbose: bool = True,
    **kwinputs: Any,  # noqa: ANN401
) -> None:
    """Profile a call, and with `backward` its backward pass, after 30 to warm up.

    Prints torch's table with `verbose`, and writes a trace to `trace_filename`. `cpu` adds what the
    host does, as does a machine without a GPU.
    """

    def run() -> None:
        with torch.autocast(_device_of(inputs), amp_dtype, enabled=amp):
            result = _first(fn(*inputs, **kwinputs))
        if backward:
            _forget_gradients(inputs)
            result.backward(torch.ones_like(result))

    for _ in range(30):
        run()
    kinds = torch.profiler.ProfilerActivity
    has_gpu = torch.cuda.is_available()
    activities = [kinds.CUDA] * has_gpu + [kinds.CPU] * (cpu or not has_gpu)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        run()
    if verbose:
        print(profile.key_averages().table(row_limit=50))  # noqa: T201
    if trace_filename is not None:
        profile.export_chrome_trace(trace_filename)


def _timed(run: Callable[[], None], repeats: int, desc: str, verbose: bool) -> Timed:
    timer = benchmark.Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    measured = timer.timeit(repeats)
    if verbose:
        print(desc)  # noqa: T201
        print(measured)  # noqa: T201
    return timer, measured


def _device_of(inputs: tuple[Any, ...]) -> str:
    found = (x.device.type for x in inputs if isinstance(x, torch.Tensor))
    return next(found, "cuda" if torch.cuda.is_available() else "cpu")


def _first(result: Any) -> Any:  # noqa: ANN401 - the first of several
    return result[0] if isinstance(result, tuple) else result


def _gradient(result: Tensor, grad: Tensor | None) -> Tensor:
    if grad is None:
        return torch.randn_like(result)
    if grad.shape != result.shape:
        raise InvalidInputError(
            f"grad has shape {list(grad.shape)}, the result {list(result.shape)}: they "
            "must be alike"
        )
    return grad


def _forget_gradients(inputs: tuple[Any, ...]) -> None:
    for x in inputs:
        if isinstance(x, torch.Tensor):
            x.grad = None
